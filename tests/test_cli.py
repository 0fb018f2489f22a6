"""The command line's contract: exit statuses, one message per mistake, no process left behind.

The ranks are real processes under torch's launcher; in them a `sitecustomize` replaces trainer, data loader and report.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_scalebio import cli, launch
from megatron_scalebio.config import UserError

FAKES = """
import os, signal, sys, time, types

def train(run):
    import pathlib
    config = run.config
    rank = int(os.environ.get("RANK", "0"))
    folder = pathlib.Path(config.run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))
    (folder / f"rank{rank}").write_text(f"{os.getpid()} {os.environ.get('WORLD_SIZE')} {os.environ['OMP_NUM_THREADS']}")
    BEHAVIOUR
    while not stop:
        time.sleep(0.02)
    time.sleep(0.3)
    (folder / f"saved{rank}").write_text("")
    return 128 + stop[0]

trainer = types.ModuleType("megatron_scalebio.trainer")
trainer.train = train
sys.modules["megatron_scalebio.trainer"] = trainer
report = types.ModuleType("megatron_scalebio.show.report")
report.write_report = lambda folder: folder
sys.modules["megatron_scalebio.show.report"] = report
data = types.ModuleType("megatron_scalebio.data")
data.Dataset = object
data.load_dataset = lambda config, tokenizer: None
data.load_tokenizer = lambda name: types.SimpleNamespace(vocab_size=258)
sys.modules["megatron_scalebio.data"] = data
"""

USER_ERROR_ON = (
    "from megatron_scalebio.config import UserError\n"
    "    if rank in {ranks}: raise UserError('data.sources: clean.jsonl:3: no response')"
)


@pytest.fixture
def start(tmp_path):
    """start(behaviour, *arguments): the process of `launch --nproc 2 train` whose ranks run `behaviour`."""
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "data": {"sources": [{"name": "clean", "path": "clean.jsonl"}], "validation": "val.jsonl"},
                "run": {"output_dir": str(tmp_path / "run")},
            }
        )
    )
    processes = []

    def start(behaviour: str, *arguments: str) -> subprocess.Popen:
        (tmp_path / "sitecustomize.py").write_text(FAKES.replace("BEHAVIOUR", behaviour))
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environment |= {"PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-m", "megatron_scalebio", "launch", "--nproc", "2"]
        command += ["train", "--config", str(tmp_path / "config.yaml"), *arguments]
        process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def wait_for_ranks(folder: Path) -> list[int]:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        files = [folder / "rank0", folder / "rank1"]
        if all(file.exists() and file.read_text() for file in files):
            return [int(file.read_text().split()[0]) for file in files]
        time.sleep(0.05)
    raise AssertionError("the ranks did not start")


def test_launch_gives_zero_and_each_rank_its_place_and_its_share_of_the_cores(start, tmp_path):
    process = start("return 0")
    _, messages = process.communicate(timeout=60)
    assert (process.returncode, messages) == (0, "")
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    for rank in range(2):
        assert (tmp_path / "run" / f"rank{rank}").read_text().split()[1:] == ["2", threads]


@pytest.mark.parametrize("ranks", [(0, 1), (0,), (1,)])
def test_user_error_in_ranks_is_told_once_and_gives_two(start, ranks):
    process = start(USER_ERROR_ON.format(ranks=ranks))
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 2
    assert messages == "error: data.sources: clean.jsonl:3: no response\n"


def test_crash_of_a_rank_gives_one_and_its_traceback(start):
    process = start("signal.signal(signal.SIGTERM, signal.SIG_DFL)\n    if rank == 1: raise RuntimeError('planted')")
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 1
    assert messages.count("RuntimeError: planted") == 1
    assert messages.rstrip().endswith("error: rank 1 failed with exit status 1; the other ranks were stopped")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_lets_every_rank_save_then_gives_128_plus_its_number(start, tmp_path, number):
    process = start("pass")
    pids = wait_for_ranks(tmp_path / "run")
    process.send_signal(number)
    _, messages = process.communicate(timeout=60)
    assert (process.returncode, messages) == (128 + number, "")
    assert all((tmp_path / "run" / f"saved{rank}").exists() for rank in range(2))
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")
def test_killed_launcher_leaves_no_rank_behind(start, tmp_path):
    process = start("time.sleep(3600)")
    ranks = [psutil.Process(pid) for pid in wait_for_ranks(tmp_path / "run")]
    process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive


def test_launch_checks_everything_before_it_starts_a_rank(start, tmp_path):
    process = start("return 0", "parallel.tensor=3", "model.shape.vocab_size=100")
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 2
    assert messages.startswith("error: ") and "parallel.tensor=3" in messages and "Traceback" not in messages
    assert not (tmp_path / "run").exists()


def test_train_alone_is_a_world_of_one(monkeypatch):
    seen = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("megatron_scalebio.run.open_run", lambda *given, **named: seen.append((given, named)) or "run")
    monkeypatch.setattr(cli, "_dry_run", lambda args, *arguments: seen.append(arguments) or 0)
    assert cli.main(["train", "--config", "x.yaml", "a=1", "--dry-run", "b=2"]) == 0
    assert seen == [(("x.yaml", ["a=1", "b=2"]), {"world_size": 1, "dry": True}), ("run", 1)]


@pytest.mark.parametrize(
    "rank, local_rank, printed",
    [("0", "0", "error: rule\n"), ("1", "1", ""), ("8", "0", "error: node2, rank 8: rule\n")],
)
def test_rank_zero_and_the_first_of_another_node_print_a_user_error(monkeypatch, capsys, rank, local_rank, printed):
    def refuse(args):
        raise UserError("rule")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setattr(launch.socket, "gethostname", lambda: "node2")
    monkeypatch.setattr(cli, "_train", refuse)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == printed


@pytest.mark.parametrize(
    "arguments", [["launch", "train"], ["launch", "--nproc", "2"], ["launch", "--nproc", "0", "train"], ["fly"]]
)
def test_malformed_command_gives_two(arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "nodes, first", [("node[03-04,09],other1", "node03"), ("gpu7,gpu9", "gpu7"), ("a[1,5]", "a1"), ("solo", "solo")]
)
def test_slurm_step_names_rank_world_and_first_node(monkeypatch, nodes, first):
    slurm = {"STEP_NUM_TASKS": "4", "PROCID": "3", "LOCALID": "1", "STEP_NODELIST": nodes, "JOB_ID": "20007"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    monkeypatch.setattr(launch.os, "environ", environment)
    launch.adopt_slurm_environment()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [environment[name] for name in names] == ["3", "1", "4", first, "20007"]


def test_script_of_a_slurm_job_outside_a_step_stays_one_process(monkeypatch):
    environment = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}
    monkeypatch.setattr(launch.os, "environ", environment)
    launch.adopt_slurm_environment()
    assert "RANK" not in environment


def test_help_does_not_import_torch():
    code = "import sys\nfrom megatron_scalebio import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
