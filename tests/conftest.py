"""The quick tier: with --quick, what a person runs while working; all else is left to the full tier."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# Chosen by cost: what needs no process of its own, or one rank. Of many ranks, one TP2 and one PP2 of each kind.
QUICK_FILES = (
    *("config/", "data/", "hf/", "plan/test_machine.py", "plan/test_planner.py", "show/", "test_active_layers.py"),
    *("test_anatomy.py", "test_bilevel.py", "test_device.py", "test_docs.py", "test_golden.py", "test_losses.py"),
    *("test_reference.py", "test_resolution.py", "test_run.py", "test_source_weights.py", "test_structure.py"),
    *("kernels/test_loss_sums.py", "tools/test_document_settings.py", "compare/test_statistics.py"),
)
# Of these files the tests in whose names one of the words is.
QUICK_TESTS = {
    "kernels/test_fp8.py": ("a_block_errs", "the_largest_number"),
    "mcore/test_active_set.py": ("[independent draws]",),
    "mcore/test_families.py": ("fp64[gemma2-packed]", "fp64[qwen3-TP2 with"),
    "mcore/test_layouts.py": ("layout[TP2 with", "layout[tied, PP2]"),
    "mcore/test_parity.py": ("fp64[default]", "fp64[paper]"),
    "plan/test_sizes.py": ("published_models", "norms_again", "written_down_twice", "[parallel.pipeline=2 precision"),
    "test_checkpoint.py": ("[one rank",),
    "test_examples.py": ("is_planned_to_fit", "does_not_fit"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="run the quick tier alone, in under two minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("quick"):
        return
    wanted = [(file, "") for file in QUICK_FILES]
    wanted += [(file, word) for file, words in QUICK_TESTS.items() for word in words]
    chosen, found = [], set()
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        reasons = {(file, word) for file, word in wanted if name.startswith(file) and word in name}
        found |= reasons
        chosen += [item] if reasons else []
    absent = [f"{file} {word}" for file, word in wanted if (file, word) not in found]
    if absent and config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        raise pytest.UsageError(f"the quick tier of tests/conftest.py names tests that are not there: {absent}")
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and tokenizers beside the repository."""
    folder = Path(os.environ.get("MEGATRON_SCALEBIO_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir() or not (folder / "tokenizers").is_dir():
        pytest.skip(f"no data and tokenizers in {folder}; MEGATRON_SCALEBIO_SHARED can name another folder")
    return folder
