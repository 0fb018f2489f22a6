"""The scripts a newcomer runs: they find a Python that works, install once, run, and say what they miss."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_scalebio import cli
from megatron_scalebio.config import load_config
from megatron_scalebio.dry_run import rehearsed
from megatron_scalebio.plan.planner import Plan
from megatron_scalebio.plan.report import layout_line, parameters_line
from megatron_scalebio.plan.seconds import H100
from megatron_scalebio.plan.sizes import GIB
from megatron_scalebio.rules import check_config
from megatron_scalebio.run import open_config
from tests.plan.test_memory import with_layers

REPOSITORY = Path(__file__).parents[1]

# Stands in for Python: notes what it is asked to install, and fails at it while FAILING names a word of the command.
FAKE_PYTHON = """#!/bin/bash
case "$1 $2" in
    "--version ") echo "Python 3.12.99" ;;
    "-c "*) exit 0 ;;
    "-m venv") mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    "-m pip")
        echo "${@:3}" >>"$LOG"
        if [ -n "$FAILING" ] && [[ "$*" == *"$FAILING"* ]]; then exit 1; fi ;;
esac
"""


@pytest.fixture
def install(tmp_path):
    """install(): sources install.sh in a small copy of the repository where only fake Pythons are to be found."""
    for name in ("examples/install.sh", "requirements.txt", "setup.py"):
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / "copy" / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "cat", "cp", "dirname", "mkdir", "rm"):
        (tools / tool).symlink_to(shutil.which(tool))
    log = tmp_path / "log"

    def install(failing: str = "", **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        log.write_text("")
        script = f'set -euo pipefail; source "{tmp_path}/copy/examples/install.sh"; echo "$PYTHON"'
        environment |= {"PATH": str(tools), "HOME": str(tmp_path), "LOG": str(log), "FAILING": failing}
        command = [str(tools / "bash"), "-c", script]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return result, log.read_text().splitlines()

    install.tools, install.root = tools, tmp_path / "copy"
    return install


def put_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def test_install_says_so_if_no_python_runs(install):
    put_program(install.tools / "python3.12", "#!/bin/bash\necho 'shim: version not installed' >&2\nexit 127\n")
    result, installed = install()
    assert result.returncode == 2 and installed == []
    assert result.stderr.startswith("error: no Python >= 3.12 that runs was found")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("place", ["bin/python3.13", ".pyenv/versions/3.12.7/bin/python"])
def test_install_passes_by_a_shim_that_fails(install, tmp_path, place):
    put_program(install.tools / "python3.12", "#!/bin/bash\nexit 127\n")
    put_program(tmp_path / place, FAKE_PYTHON)
    result, installed = install()
    assert result.returncode == 0
    assert result.stdout.strip() == str(install.root / ".venv" / "bin" / "python")
    assert [line.split()[-1] for line in installed] == [str(install.root / "requirements.txt"), str(install.root)]


def test_install_is_done_once_until_something_changes(install):
    put_program(install.tools / "python3.12", FAKE_PYTHON)
    assert len(install()[1]) == 2
    assert install()[1] == []
    for name in ("requirements.txt", "setup.py"):
        with open(install.root / name, "a") as file:
            file.write("# changed\n")
        assert len(install()[1]) == 2
        assert install()[1] == []


@pytest.mark.parametrize("failing", ["requirements.txt", "--editable"])
def test_an_interrupted_install_is_not_taken_as_done(install, failing):
    put_program(install.tools / "python3.12", FAKE_PYTHON)
    assert install(failing)[0].returncode != 0
    assert len(install()[1]) == 2
    assert install()[1] == []


def test_a_container_may_keep_its_own_python(install):
    result, installed = install(NO_INSTALL="1", PYTHON="/opt/python")
    assert (result.stdout.strip(), installed) == ("/opt/python", [])


def test_ci_runs_the_tests_script():
    ci = REPOSITORY / ".ci" / "run"
    assert os.access(ci, os.X_OK)
    assert "bash tests/run.sh" in ci.read_text()


@pytest.mark.parametrize("example", ["quickstart", "gsm8k_kinds"])
def test_settings_of_an_example_keep_the_rules(example, monkeypatch):
    monkeypatch.setenv("DATA_DIR", "/data")
    monkeypatch.setenv("TOKENIZER", "/tokenizer")
    check_config(load_config(str(REPOSITORY / "examples" / f"{example}.yaml"), []), world_size=2, vocab_size=None)


def test_a_large_model_is_rehearsed_without_gpu_and_weights_and_fits(tmp_path):
    result = run_example("qwen25_32b_8xh100", tmp_path, "--dry-run", MODEL="", DATA_DIR="")
    assert result.returncode == 0, result.stderr
    assert "neither MODEL nor DATA_DIR is set" in result.stdout and "source clean: " in result.stdout
    assert "tensor 1 x pipeline 4 x data 2" in result.stdout and "parameters: 32,763,876,352 each" in result.stdout
    needed, available = re.search(r"^fits: .* needs ([0-9.]+) GiB of ([0-9.]+)$", result.stdout, re.M).groups()
    assert float(needed) < 64 < float(available)


LARGE = {  # layout, parameters as the models' makers state them, GiB of the fullest GPU: at least, at most, and its own
    "llama3_8b_8xh100": ("8 ranks = tensor 2 x pipeline 1 x data 4", 8_030_261_248, 0, 64, 79.1),
    "gemma2_9b_8xh100": ("8 ranks = tensor 2 x pipeline 1 x data 4", 9_241_705_984, 0, 64, 79.1),
    "qwen2_7b_8xh100": ("8 ranks = tensor 2 x pipeline 1 x data 4", 7_615_616_512, 0, 64, 79.1),
    "qwen25_32b_8xh100": ("8 ranks = tensor 1 x pipeline 4 x data 2", 32_763_876_352, 0, 64, 79.1),
    "qwen25_32b_1xh200": ("1 ranks = tensor 1 x pipeline 1 x data 1", 32_763_876_352, 100, 0.9 * 139.8, 139.8),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_example_is_planned_to_fit(tmp_path, monkeypatch, name):
    layout, parameters, least, most, available = LARGE[name]
    plan = plan_of(name, tmp_path, monkeypatch)
    assert layout in layout_line(plan) and f"parameters: {parameters:,} each" in parameters_line(plan)
    assert plan.fits and least < plan.fullest.total / GIB < most
    assert plan.memory / GIB == pytest.approx(available)


@pytest.mark.parametrize("name", ["llama3_8b_8xh100", "gemma2_9b_8xh100", "qwen2_7b_8xh100"])
def test_the_rehearsal_of_a_large_examples_first_layers_finds_the_plan_right(tmp_path, monkeypatch, name):
    plan = plan_of(name, tmp_path, monkeypatch)
    plan = Plan.of(with_layers(plan.config, 4), plan.world_size, plan.memory)
    assert rehearsed(plan, 0).total == pytest.approx(plan.stages[0].total, rel=0.01)


def test_what_does_not_fit_is_said_with_the_part_that_breaks_it(tmp_path, monkeypatch):
    """The 32B model's FP8 store switched off, and every rank holding all layers."""
    faults = ("precision.frozen_weights=bf16", "parallel.pipeline=1", "parallel.layers_per_stage=null")
    plan = plan_of("qwen25_32b_8xh100", tmp_path, monkeypatch, *faults)
    assert not plan.fits
    assert plan.verdict.startswith("does not fit: rank 0 (stage 0) needs")
    assert "largest part: frozen weights" in plan.verdict


def plan_of(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Plan:
    """The plan of the command that an example's script starts, with only config.json of its model and no data."""
    put_program(folder / "python", '#!/bin/bash\nprintf "%s\\0" "$@" >"$LOG"\n')
    model = str(REPOSITORY / "examples" / "models" / name.rpartition("_")[0])
    folders = {"MODEL": model, "DATA_DIR": str(folder)}
    result = run_example(name, folder, *arguments, PYTHON=str(folder / "python"), LOG=str(folder / "log"), **folders)
    assert result.returncode == 0, result.stderr
    module, package, *command = (folder / "log").read_text().split("\0")[:-1]
    assert (module, package) == ("-m", "megatron_scalebio")
    args = cli._parse(command)
    for variable, value in folders.items():
        monkeypatch.setenv(variable, value)
    config = open_config(args.config, args.overrides, world_size=args.nproc)
    return Plan.of(config, args.nproc, int(args.gpu_memory * GIB) if args.gpu_memory else H100.memory)


@pytest.mark.parametrize("name", ["llama3_8b_8xh100", "smollm2_135m"])
@pytest.mark.parametrize("missing", ["MODEL", "DATA_DIR"])
def test_an_example_says_which_folder_it_misses(tmp_path, name, missing):
    result = run_example(name, tmp_path, **({"MODEL": str(tmp_path), "DATA_DIR": str(tmp_path), missing: "absent"}))
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: {missing}=absent is not a folder") and result.stderr.count("\n") == 1


def run_example(name: str, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"NO_INSTALL": "1", "PYTHON": sys.executable} | environment
    command = ["bash", str(REPOSITORY / "examples" / f"{name}.sh"), *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize("missing", ["DATA_DIR", "TOKENIZER"])
def test_gsm8k_kinds_says_which_folder_it_misses(tmp_path, missing):
    environment = {"DATA_DIR": str(tmp_path), "TOKENIZER": str(tmp_path), missing: "absent"}
    result = run_example("gsm8k_kinds", tmp_path, **environment)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: {missing}=absent is not a folder") and result.stderr.count("\n") == 1


def test_quickstart_trains_from_any_folder_and_leaves_its_outputs(tmp_path):
    result = run_example("quickstart", tmp_path, "bilevel.steps=2", "run.output_dir=here", "run.export_model=both")
    assert result.returncode == 0, result.stderr
    weights = json.loads((tmp_path / "here" / "weights.json").read_text())
    for folder, role in (("hf", "upper"), ("hf_lower", "lower")):
        assert f"**{role}** model" in (tmp_path / "here" / folder / "README.md").read_text()
    assert weights["step"] == 2 and list(weights["weights"])[0] == "clean"
    assert abs(sum(weights["weights"].values()) - 1) < 1e-12
    assert (tmp_path / "here" / "report.html").exists() and "report: " in result.stdout
    assert "final weight" in result.stdout and "interval" not in result.stdout  # of two steps
    assert "Traceback" not in result.stderr

    again = run_example("quickstart", tmp_path, "bilevel.steps=2", "run.output_dir=here", "lisa.period=1")
    assert again.returncode == 2
    assert again.stderr.startswith("error: run.output_dir=") and again.stderr.count("\n") == 1
