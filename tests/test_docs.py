"""What the documents name is there."""

import re
from pathlib import Path

import pytest

from megatron_scalebio import open_run
from megatron_scalebio.data.records import read_records
from tools.benchmarks.tasks import make_arithmetic

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
# The log and the changelog also name what was there once.
OF_TODAY = [path for path in DOCUMENTS if path.name not in ("log.md", "CHANGELOG.md")]
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
CODE = re.compile(r"`([\w./]+\.py|(?:docs|examples|kernels|tests|tools)/[\w./]+)`")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document):
    links = LINK.findall(document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", OF_TODAY, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(document):
    """A name may leave out the folders that it is in; NAME stands for one of the reader's own."""
    files = [*REPOSITORY.glob("*.py")]
    for room in ("megatron_scalebio", "kernels", "tests", "tools", "examples", "docs"):
        files += (REPOSITORY / room).rglob("*")
    known = [f"/{path.relative_to(REPOSITORY)}" for path in files]
    names = CODE.findall(document.read_text(encoding="utf-8"))
    names = [name for name in names if "NAME" not in name]
    assert [name for name in names if not any(path.endswith(f"/{name.rstrip('/')}") for path in known)] == []


def test_the_readmes_yaml_runs_as_it_stands(tmp_path):
    """As far as a run gets without building its models: settings, data, folders."""
    (yaml,) = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(yaml, encoding="utf-8")
    make_arithmetic(tmp_path / "runs" / "arithmetic", seed=1)
    run = open_run(tmp_path / "mine.yaml", ["bilevel.steps=50", f"run.output_dir={tmp_path / 'out'}"])
    assert run.dataset.source_names == ["clean", "half_wrong", "all_wrong"] and run.dataset.test
    assert run.config.bilevel.validation_batch_size == 60


def test_the_readmes_records_are_of_five_formats(tmp_path):
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (records,) = [block for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) if block.startswith("{")]
    file = tmp_path / "records.jsonl"
    file.write_text(records, encoding="utf-8")
    assert len(read_records(str(file), "data.sources")) == 5
