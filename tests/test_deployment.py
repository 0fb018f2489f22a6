"""Container and Slurm: what can be checked where there is neither a Docker engine nor Slurm."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from tests.test_examples import put_program

REPOSITORY = Path(__file__).parents[1]
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
IN_THE_IMAGE = {"torch", "numpy", "triton"}

# Notes its arguments; has the image unless NO_IMAGE says why not.
FAKE_DOCKER = """#!/bin/bash
if [ "$1 $2" = "image inspect" ]; then
    if [ -n "$NO_IMAGE" ]; then echo "$NO_IMAGE" >&2; exit 1; fi
    exit 0
fi
printf '%s\\0' "$@" >"$LOG"
exit "${STATUS:-0}"
"""

# Does as srun's first of 16 tasks: its options end at the first word that is none.
FAKE_SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do echo "$1" >>"$LOG"; shift; done
export SLURM_STEP_NUM_TASKS=16 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_NODELIST="node[3-4]"
exec "$@"
"""


# Dockerfile


def test_what_the_dockerfile_copies_is_there_and_not_ignored():
    sources = []
    for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE):
        sources += [word for word in line.split()[:-1] if not word.startswith("--")]
    assert {"setup.py", "megatron_scalebio", "kernels"} <= set(sources)
    assert [source for source in sources if not (REPOSITORY / source).exists()] == []
    ignored, *kept = [
        line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if not line.startswith(("#", "**/"))
    ]
    assert ignored == "*" and kept == [f"!{source}" for source in sources]


def test_the_dockerfile_installs_what_setup_asks_for_and_the_image_lacks():
    setup = ast.parse((REPOSITORY / "setup.py").read_text())
    call = next(node for node in ast.walk(setup) if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup")
    asked = ast.literal_eval(next(word.value for word in call.keywords if word.arg == "install_requires"))
    asked = {line[0]: line[1] for line in (re.split("[>=;,]+", requirement) for requirement in asked)}
    installed = re.findall(r'"([\w-]+)[=>]+([\d.]+)[^"]*"', DOCKERFILE.split("COPY")[0])
    assert {name for name, _ in installed} == set(asked) - IN_THE_IMAGE
    assert dict(installed)["megatron-core"] == version("megatron-core")
    assert [name for name, least in installed if Version(least) < Version(asked[name])] == []
    # Nothing may drag in, or replace, what the image has.
    pips = re.findall(r"pip install(.*?)(?:&&|\n(?=\S)|$)", DOCKERFILE.replace("\\\n", " "), re.DOTALL)
    assert len(pips) == 3 and "PIP_CONSTRAINT" in DOCKERFILE.split("pip install")[0]
    assert ["--no-deps" in line for line in pips] == [False, True, True]


@pytest.fixture
def import_check(tmp_path):
    """import_check(packages): the Dockerfile's last step, in this Python, after the image had `packages`."""
    check = re.search(r"^RUN python3 -W ignore - <<'EOF'\n(.*)^EOF$", DOCKERFILE, re.DOTALL | re.MULTILINE)[1]

    def import_check(packages: list[str]) -> subprocess.CompletedProcess:
        (tmp_path / "image-packages.txt").write_text("\n".join(packages) + "\n")
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "packages")}
        command = [sys.executable, "-W", "ignore", "-"]
        return subprocess.run(
            command, input=check, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    return import_check


def test_the_import_check_passes_where_a_package_needs_a_driver(import_check, tmp_path):
    package = tmp_path / "packages" / "transformer_engine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('raise OSError("libcuda.so.1: cannot open shared object file")\n')
    result = import_check([f"torch=={version('torch')}", f"numpy=={version('numpy')}"])
    assert result.returncode == 0, result.stderr
    assert "transformer_engine: found; not imported on this machine: libcuda.so.1" in result.stdout
    assert f"megatron-core {version('megatron-core')}" in result.stdout


def test_the_import_check_fails_if_a_package_of_the_image_was_changed(import_check):
    result = import_check([f"torch=={version('torch')}", "numpy==1.26.4"])
    assert result.returncode == 1
    assert result.stderr == "error: packages of the image were changed: numpy\n"


# examples/ngc.sh


@pytest.fixture
def ngc(tmp_path):
    """ngc(*arguments): runs ngc.sh of a repository whose path has a space; gives the result and docker's arguments."""
    root = tmp_path / "the repository"
    (root / "examples").mkdir(parents=True)
    shutil.copy(REPOSITORY / "examples" / "ngc.sh", root / "examples")
    tools = tmp_path / "bin"
    for tool in ("bash", "dirname", "find", "id", "mkdir", "readlink"):
        tools.mkdir(exist_ok=True)
        (tools / tool).symlink_to(shutil.which(tool))
    put_program(tools / "docker", FAKE_DOCKER)
    log = tmp_path / "log"

    def ngc(*arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        log.unlink(missing_ok=True)
        environment |= {"PATH": str(tools), "LOG": str(log)}
        command = [str(tools / "bash"), str(root / "examples" / "ngc.sh"), *arguments]
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        return result, log.read_text().split("\0")[:-1] if log.exists() else []

    ngc.root, ngc.tools = root, tools
    return ngc


COMMAND = ("bash", "examples/qwen25_32b_8xh100.sh", "bilevel.steps=3", "data.sources=[{name: a b, path: '/x y'}]")


def test_ngc_mounts_what_the_command_needs_at_its_own_paths(ngc, tmp_path):
    for folder in ("my models/blobs", "my models/snapshot", "data", "tokenizer", "other", "more of it"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "my models/blobs/1234").touch()
    (tmp_path / "my models/snapshot/model.safetensors").symlink_to("../blobs/1234")
    (tmp_path / "data/inside.jsonl").touch()
    (tmp_path / "data/link.jsonl").symlink_to("inside.jsonl")
    folders = {"MODEL": "my models/snapshot", "DATA_DIR": "data", "TOKENIZER": str(tmp_path / "tokenizer")}
    result, arguments = ngc(*COMMAND, **folders, MOUNTS=f"other:{tmp_path}/more of it")
    assert result.returncode == 0, result.stderr
    assert arguments[0] == "run" and tuple(arguments[-len(COMMAND) - 1 :]) == ("megatron_scalebio", *COMMAND)
    pairs = list(zip(arguments, arguments[1:], strict=False))
    root = str(ngc.root)
    mounts = [value for option, value in pairs if option == "--volume"]
    expected = [root, f"{root}/runs"] + [
        f"{tmp_path}/{name}"
        for name in ("my models/snapshot", "my models/blobs", "data", "tokenizer", "other", "more of it")
    ]
    assert sorted(mounts) == sorted([f"{path}:{path}" for path in expected] + [f"{root}:/opt/megatron_scalebio"])
    assert (ngc.root / "runs").is_dir()
    environment = dict(value.split("=", 1) for option, value in pairs if option == "--env")
    assert environment == {"NO_INSTALL": "1", "HOME": "/tmp", "USER": "user"} | {
        "MODEL": f"{tmp_path}/my models/snapshot", "DATA_DIR": f"{tmp_path}/data", "TOKENIZER": f"{tmp_path}/tokenizer"
    }  # fmt: skip
    for pair in (("--gpus", "all"), ("--ulimit", "memlock=-1"), ("--ulimit", "stack=67108864"), ("--workdir", root)):
        assert pair in pairs
    assert "--ipc=host" in arguments and "--rm" in arguments and "--tty" not in arguments
    assert ("--user", f"{os.getuid()}:{os.getgid()}") in pairs


def test_ngc_print_shows_the_command_that_it_would_run(ngc, tmp_path):
    (tmp_path / "a model").mkdir()
    _, ran = ngc(*COMMAND, MODEL="a model", IMAGE="registry/image:1")
    assert "registry/image:1" in ran
    result, none = ngc("--print", *COMMAND, MODEL="a model", IMAGE="registry/image:1")
    assert result.returncode == 0 and none == [] and result.stdout.count("\n") == 1
    assert shlex.split(result.stdout) == ["docker", *ran]
    environment = {"PATH": str(ngc.tools), "LOG": str(tmp_path / "log")}
    subprocess.run([str(ngc.tools / "bash"), "-c", result.stdout], env=environment, check=True)
    assert (tmp_path / "log").read_text().split("\0")[:-1] == ran


def test_ngc_passes_on_the_status(ngc):
    assert ngc("true", STATUS="143")[0].returncode == 143


def test_ngc_says_what_is_missing_in_one_message(ngc, tmp_path):
    def told(*arguments: str, **environment: str) -> str:
        result, ran = ngc(*arguments, **environment)
        assert result.returncode == 2 and ran == [] and result.stdout == "" and result.stderr.count("\n") == 1
        return result.stderr

    assert told() == told("--print") == "error: expected: ngc.sh [--print] COMMAND ...\n"
    for name in ("MODEL", "DATA_DIR", "TOKENIZER"):
        assert told("--print", "true", **{name: "absent"}) == f"error: {name}=absent is not a folder\n"
    assert told("true", MOUNTS=f"{tmp_path}:absent").startswith("error: absent in MOUNTS=")
    message = told("true", NO_IMAGE="Error: No such image")
    assert "docker has no image megatron_scalebio (Error: No such image)" in message and "docker build -t" in message
    (ngc.tools / "docker").unlink()
    assert told("true").startswith("error: there is no docker here")
    assert ngc("--print", "true")[0].returncode == 0


# examples/slurm


@pytest.fixture
def two_nodes(tmp_path):
    """two_nodes(*arguments): the script as Slurm runs it, a copy elsewhere; gives the result and srun's options."""
    tools, log = tmp_path / "bin", tmp_path / "log"
    put_program(tools / "srun", FAKE_SRUN)
    put_program(tools / "scontrol", '#!/bin/bash\necho "scontrol $*" >>"$LOG"\n')
    script = tmp_path / "slurm_script"
    shutil.copy(REPOSITORY / "examples" / "slurm" / "two_nodes.sbatch", script)

    def two_nodes(*arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        log.write_text("")
        slurm = {"JOB_ID": "42", "JOB_NAME": "a job", "CPUS_PER_TASK": "1", "SUBMIT_DIR": str(REPOSITORY)}
        environment = (
            {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK", "WORLD_"))}
            | {f"SLURM_{name}": value for name, value in slurm.items()}
            | {"NO_INSTALL": "1", "PYTHON": sys.executable, "LOG": str(log), "MODEL": "", "DATA_DIR": ""}
            | {"PATH": f"{tools}:{os.environ['PATH']}"}
            | environment
        )
        result = subprocess.run(
            ["bash", str(script), *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        return result, log.read_text().splitlines()

    return two_nodes


def test_two_nodes_are_planned_as_sixteen_ranks(two_nodes, tmp_path):
    data = tmp_path / "the data"
    make_data = [sys.executable, str(REPOSITORY / "examples" / "arithmetic.py"), str(data), "--seed", "1"]
    subprocess.run(make_data, check=True)
    result, options = two_nodes(
        "--dry-run",
        "data.tokenizer=bytes",
        f"data.sources=[{{name: clean, path: '{data}/train/clean.jsonl'}}]",
        MODEL=str(REPOSITORY / "examples" / "models" / "qwen25_32b"),
        DATA_DIR=str(data),
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"layout: 16 ranks = tensor 1 x pipeline \d+ x data \d+", result.stdout)
    assert f"outputs: {REPOSITORY}/runs/a job\n" in result.stdout
    assert "--cpus-per-task=1" in options and not any("scontrol" in line for line in options)


def test_slurm_asks_for_as_many_tasks_as_gpus_and_warns_the_tasks_not_the_script():
    script = (REPOSITORY / "examples" / "slurm" / "two_nodes.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, re.MULTILINE))
    assert asked["nodes"] == "2" and asked["ntasks-per-node"] == asked["gpus-per-node"] == "8"
    assert re.fullmatch(r"TERM@\d+", asked["signal"])
    # Slurm stops reading its directives at the first command.
    assert "#SBATCH" not in script.split("set -euo pipefail")[1]


@pytest.mark.parametrize("status, saves, requeued", [(143, True, True), (143, False, False), (1, True, False)])
def test_a_job_queues_again_if_its_signal_left_a_checkpoint(two_nodes, tmp_path, status, saves, requeued):
    for name in ("examples/install.sh", "examples/qwen25_32b_8xh100.yaml"):
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / "copy" / name)
    checkpoints = tmp_path / "copy" / "runs" / "a job" / "checkpoints"
    (checkpoints / "step_10").mkdir(parents=True)
    save = f"mkdir '{checkpoints}/{'step_20' if saves else 'step_20.partial'}'"
    put_program(tmp_path / "bin" / "srun", f"#!/bin/bash\n{save}\nexit {status}\n")
    result, log = two_nodes(MODEL=str(tmp_path), DATA_DIR=str(tmp_path), SLURM_SUBMIT_DIR=str(tmp_path / "copy"))
    assert result.returncode == status and result.stderr == ""
    assert log == (["scontrol requeue 42"] if requeued else [])


def test_a_job_says_which_folder_it_misses(two_nodes, tmp_path):
    folders = {"MODEL": str(tmp_path), "DATA_DIR": str(tmp_path)}
    for missing, message in (
        ({"MODEL": "absent"}, "error: MODEL=absent is not a folder; "),
        ({"DATA_DIR": ""}, "error: DATA_DIR= is not a folder; "),
        ({"SLURM_SUBMIT_DIR": str(tmp_path)}, f"error: {tmp_path} is not this repository's folder; "),
    ):
        result, ran = two_nodes(**folders | missing)
        assert result.returncode == 2 and ran == [] and result.stdout == ""
        assert result.stderr.startswith(message) and result.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["ngc.sh", "slurm/two_nodes.sbatch"])
def test_a_script_can_be_parsed(script):
    subprocess.run(["bash", "-n", str(REPOSITORY / "examples" / script)], check=True)
