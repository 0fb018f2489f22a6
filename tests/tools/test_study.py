"""The study runner: what is run and what is not run again, what a file may be continued with, what its summary says."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_scalebio.config import UserError
from tests.distributed import run_distributed
from tools import study as program
from tools.benchmarks.tasks import QUICKSTART, settings_of, sources_of
from tools.studies import moments, presets, runner, smollm2
from tools.studies.runner import Arm, Job, Study, run_study, signal_to_noise, summarise, table_lines

LOSSES = {("plain", 1): 2.0, ("plain", 2): 3.0, ("better", 1): 1.5, ("better", 2): 2.75, ("better", 3): 9.0}
WEIGHTS = {("plain", 1): (0.2, 0.5, 0.3), ("plain", 2): (0.5, 0.3, 0.2)}
SETTINGS = {"plain": ("bilevel.steps=4",), "better": ("bilevel.steps=4", "optimizer.lr=1e-3")}


def outcome(job: Job) -> dict:
    arm = job.arm.name, job.seed
    return {
        "environment": {"commit": "abc", "date": f"{arm}"},
        "test_loss_before": 5.0,
        "test_loss": LOSSES[arm],
        "weights": dict(zip(("good", "fair", "bad"), WEIGHTS.get(arm, (0.6, 0.3, 0.1)), strict=True)),
        "signal_to_noise": 0.5 * job.seed if job.arm.name == "better" else None,
        "steps": 4,
        "seconds": 1.0,
        "median_step_seconds": float(job.seed),
    }


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The runs that were done, each of which comes to the numbers above."""
    done: list[Job] = []

    def run(job: Job) -> dict:
        done.append(job)
        return outcome(job)

    monkeypatch.setattr(runner, "run_job", run)
    return done


def study(**changes) -> Study:
    arms = tuple(Arm(name, settings) for name, settings in SETTINGS.items())
    parts = dict(name="s", arms=arms, task_of=lambda seed: [f"data.of={seed}"], settings=("run.device=cpu",))
    return Study(**(parts | dict(order=("good", "fair"), baseline="plain") | changes))


def run(file: Path | None, seeds: range, given: tuple[str, ...] = (), **changes) -> dict:
    return run_study(study(**changes), seeds, given, file, processes=1, threads=1)


def test_every_arm_runs_once_with_every_seed_and_the_later_settings_are_the_stronger(jobs):
    content = run(None, range(1, 3), given=("optimizer.lr=3e-3",))
    assert [(job.arm.name, job.seed) for job in jobs] == [(arm, seed) for seed in (1, 2) for arm in SETTINGS]
    assert jobs[1].settings == ["run.device=cpu", "data.of=1", *SETTINGS["better"], "optimizer.lr=3e-3"]
    assert content["runs"][1]["settings"] == [*SETTINGS["better"], "optimizer.lr=3e-3"]
    assert content["environments"] == [{"commit": "abc", "date": "('plain', 1)"}]  # equal but for the time
    assert {run["environment"] for run in content["runs"]} == {0}


def test_what_is_finished_is_not_run_again(jobs, tmp_path):
    file = tmp_path / "results" / "study.json"
    first = run(file, range(1, 2))
    assert json.loads(file.read_text()) == first
    jobs.clear()
    content = run(file, range(1, 3))
    assert [(job.arm.name, job.seed) for job in jobs] == [("plain", 2), ("better", 2)]
    assert content["runs"][:2] == first["runs"] and json.loads(file.read_text()) == content
    jobs.clear()
    assert run(file, range(1, 3)) == content and not jobs


def test_runs_before_one_that_fails_are_kept(jobs, tmp_path, monkeypatch):
    file = tmp_path / "study.json"

    def fail(job: Job) -> dict:
        if job.arm.name == "better":
            raise RuntimeError("diverged")
        return outcome(job)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="diverged"):
        patch.setattr(runner, "run_job", fail)
        run(file, range(1, 3))
    assert [row["arm"] for row in json.loads(file.read_text())["runs"]] == ["plain"]
    run(file, range(1, 2))
    assert [job.arm.name for job in jobs] == ["better"]


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(name="other"), "'study': 's'"),
        (dict(about={"task": "elsewhere"}), "elsewhere"),
        (dict(given=("run.seed=3",)), r"arm 'plain' under \['bilevel.steps=4'\], here .*run.seed=3"),
    ],
)
def test_a_file_of_something_else_is_neither_continued_nor_changed(jobs, tmp_path, change, named):
    file = tmp_path / "study.json"
    run(file, range(1, 2))
    before = file.read_text()
    with pytest.raises(UserError, match=named):
        run(file, range(1, 3), **change)
    assert file.read_text() == before


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}'])
def test_a_file_that_is_no_studys_is_refused(jobs, tmp_path, text):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(UserError, match="no study's file"):
        run(tmp_path / "study.json", range(1, 2))
    assert not jobs and (tmp_path / "study.json").read_text() == text


def test_the_summary_is_the_arithmetic_of_its_runs(jobs):
    """By hand, from the numbers at the top; seed 3 has no baseline."""
    runs = [
        {"arm": arm, "seed": seed} | outcome(Job(Arm(arm, ()), seed, None, [], [], 1)) for arm, seed in reversed(LOSSES)
    ]
    plain, better = summarise(study(), runs)
    assert (plain["arm"], plain["seeds"], better["seeds"]) == ("plain", [1, 2], [1, 2, 3])
    assert plain["weights_mean"] == pytest.approx({"good": 0.35, "fair": 0.4, "bad": 0.25})
    assert plain["weights_range"]["good"] == [0.2, 0.5]
    assert (plain["test_loss"], better["test_loss"]) == (2.5, pytest.approx(13.25 / 3))
    assert (plain["leads"], plain["in_order"], better["leads"], better["in_order"]) == (1, 1, 3, 3)
    assert plain["test_loss_minus_baseline"] == {"mean": 0, "range": [0, 0]}
    assert better["test_loss_minus_baseline"] == {"mean": -0.375, "range": [-0.5, -0.25]}
    assert plain["signal_to_noise"] is None and better["signal_to_noise"] == pytest.approx(1.0)
    assert (plain["median_step_seconds"], better["median_step_seconds"]) == (1.5, 2.0)
    lines = list(table_lines(study(), [plain, better]))
    assert (
        lines[0]
        == "| s | good | fair | bad | good leads | good > fair > rest | test loss | minus plain's | SNR | s/step |"
    )
    assert lines[3] == "| better | 0.600 | 0.300 | 0.100 | 3/3 | 3/3 | 4.4167 | -0.3750 | 1.00 | 2.000 |"
    assert len({line.count("|") for line in lines}) == 1


def test_arms_without_a_run_have_no_row_and_equal_weights_lead_nobody(jobs):
    (row,) = run(None, range(1, 2), arms=(Arm("better", ()),), order=("good",), baseline=None)["summary"]
    assert row["leads"] == 1 and "test_loss_minus_baseline" not in row
    assert not runner.in_order({"a": 0.5, "b": 0.5}, ["a"]) and runner.in_order({"a": 1.0}, ["a"])
    assert summarise(study(), []) == [] and list(table_lines(study(), [])) == []


def test_signal_to_noise_is_the_mean_over_the_scatter():
    """Of (3, 0) and (1, 2): mean (2, 1), standard deviation (sqrt 2, sqrt 2)."""
    assert signal_to_noise([torch.tensor([3.0, 0.0]), torch.tensor([1.0, 2.0])]) == pytest.approx((5 / 4) ** 0.5)
    assert signal_to_noise([None, None]) is None and signal_to_noise([torch.ones(2)]) is None


entered: list[str] = []


@contextmanager
def entering() -> Iterator[None]:
    entered.append("in")
    yield
    entered.append("out")


def run_short_jobs(task: str) -> list[dict]:
    """On a rank: two arms of one seed, three steps each, one of them with fixed weights."""
    small = [
        "bilevel.logits_gate=0",
        "bilevel.global_batch_size=10",
        "bilevel.validation_batch_size=5",
        "bilevel.steps=3",
        "lisa.period=2",
    ]
    settings = [*presets.SETTINGS, *settings_of(Path(task)), *small]
    arms = Arm("learned", (), entering), Arm("fixed", ("bilevel.mode=fixed",))
    jobs = [Job(arm, 1, QUICKSTART, [*settings, *arm.settings], small, threads=1) for arm in arms]
    outcomes = [runner.run_job(job) for job in [*jobs, jobs[0]]]
    return [*outcomes, {"entered": entered}]


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("arithmetic")
    presets.arithmetic(folder, 1)
    return folder / "seed_1"


def test_a_real_run_says_what_it_came_to_and_comes_to_it_again(task):
    ((learned, fixed, again, context),) = run_distributed(1, run_short_jobs, str(task))
    assert learned["test_loss"] == again["test_loss"] and learned["weights"] == again["weights"]
    assert list(learned["weights"]) == sources_of(task) and sum(learned["weights"].values()) == pytest.approx(1)
    assert learned["signal_to_noise"] > 0 and fixed["signal_to_noise"] is None
    assert set(fixed["weights"].values()) == {0.2} and len(set(learned["weights"].values())) > 1
    for found in (learned, fixed):
        assert found["test_loss"] < found["test_loss_before"] and found["steps"] == 3
        assert "CPU" in found["environment"]["device"] and "bilevel.steps=3" in found["environment"]["settings"]
    assert context["entered"] == ["in", "out"] * 2


def test_a_run_without_a_test_set_is_refused(task):
    job = Job(Arm("any", ()), 1, QUICKSTART, [*presets.SETTINGS, *settings_of(task), "data.test=null"], [], 1)
    with pytest.raises(UserError, match="data.test is not set"):
        runner.run_job(job)


def test_every_declared_study_can_be_started(task, capsys):
    folders = {name: ["--data", "d"] for name in ("presets", "moments", "sampling", "gate")}
    folders["smollm2"] = ["--model", "m", "--task", str(task), "--oracle", "clean"]
    for name, declared in program.STUDIES.items():
        args = program.parse([name, *folders[name], "--out", "f.json", "bilevel.steps=3"])
        made = declared.declare(args)
        assert (made.name, args.settings) == (name, ["bilevel.steps=3"])
        assert len({arm.name for arm in made.arms}) == len(made.arms) > 1
        assert made.baseline is None or made.baseline in {arm.name for arm in made.arms}
    oracle = smollm2.declare(args).arms[-1].settings[-1]
    assert oracle == "bilevel.weights={clean: 1, wrong_025: 0, wrong_050: 0, wrong_075: 0, wrong_100: 0}"
    assert program.main(["smollm2", *folders["smollm2"][:-1], "cleen"]) == 2
    assert "--oracle cleen: the sources of" in capsys.readouterr().err


def test_to_the_nearest_has_no_draws():
    rounding = moments.moments._random_bits_reference
    with moments.to_the_nearest():
        bits = moments.moments._random_bits_reference(3, 0, 0, torch.device("cpu"))
        assert len(set(bits.tolist())) == 1
    assert moments.moments._random_bits_reference is rounding
