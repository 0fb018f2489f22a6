"""What the loop records beside the mathematics: rates, memory, traces."""

import contextlib
import gzip
import io
import json
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_scalebio import trainer as loop
from megatron_scalebio.config import UserError, config_sha256
from megatron_scalebio.plan.utilization import PEAKS
from megatron_scalebio.rules import check_config
from megatron_scalebio.run import Run
from megatron_scalebio.show.metrics import read_metrics
from megatron_scalebio.spans import Span
from tests.configs import resolved
from tests.distributed import run_distributed
from tests.mcore.runs import SMALL_RUN
from tests.test_checkpoint import small_dataset

RUN = (*SMALL_RUN, "bilevel.steps=4", "run.eval_every=2", "run.save_every=0", "run.export=false")
TP2 = "parallel.tensor=2"


def run(folder: Path, settings: tuple[str, ...], device: str = "CPU", lasts: int = 4) -> None:
    """On every rank: a run that a signal ends after `lasts` steps. Rank 0 needs 1000 bytes, the next one 500 more."""
    config = resolved(*RUN, f"run.output_dir={folder}", *settings)
    dataset = small_dataset(0)
    dataset.test = dataset.validation
    peak = 1000 + 500 * dist.get_rank()
    with (
        loop._StopSignal() as stop,
        mock.patch.object(loop, "peak_memory", return_value=peak),
        mock.patch.object(loop, "device_name", return_value=device),
    ):
        trainer = loop.Trainer(Run(config, dataset))
        take_step = trainer.take_step

        def take_step_and_stop():
            stop.received = 15 if trainer.step + 1 == lasts else 0
            return take_step()

        trainer.take_step = take_step_and_stop
        trainer.train(stop)


def test_the_peak_of_memory_is_the_fullest_ranks_and_rates_are_over_the_steps_time(tmp_path):
    run_distributed(2, run, tmp_path, (TP2,))
    records = read_metrics(tmp_path)
    assert [record["peak_memory_bytes"] for record in records] == [1500] * 4
    assert ["test_loss" in record for record in records] == [False, True, False, True]
    for record in records:
        assert record["tokens_per_second"] == record["num_tokens"] / record["step_seconds"]
        assert record["mfu"] is None and record["tflops_per_gpu"] > 0


def evaluated_to_nothing(folder: Path) -> tuple[int, str]:
    """A run whose first evaluation, after step 2, divides by no tokens."""
    dataset = small_dataset(0)
    dataset.test = dataset.validation
    trainer = loop.Trainer(Run(resolved(*RUN, f"run.output_dir={folder}"), dataset))
    parts, (examples, tokens) = trainer.sampler.test_batch()
    trainer.sampler.test_batch = lambda: (parts, (examples, [0] * len(tokens)))
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        return trainer.train(), errors.getvalue()


def test_a_test_loss_that_is_not_finite_is_told_of_the_step_that_was_taken(tmp_path):
    ((status, errors),) = run_distributed(1, evaluated_to_nothing, tmp_path)
    assert status == 1 and "error: step 2, evaluation: not finite on rank 0: loss " in errors
    assert len(read_metrics(tmp_path)) == 2


def test_a_run_ends_when_its_weights_have_settled_and_stays_ended(tmp_path):
    settings = (TP2, "bilevel.steps=40", "bilevel.logits_lr=1e-6", "run.stop=settled")
    run_distributed(2, run, tmp_path, settings, "CPU", 18)
    records = read_metrics(tmp_path)
    assert len(records) == 17 and "test_loss" in records[-1]
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step_17"]
    run_distributed(2, run, tmp_path, (*settings, "run.resume=auto"), "CPU", 18)
    assert read_metrics(tmp_path) == records


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
def test_utilization_is_of_the_peak_of_a_device_that_is_known(compute, tmp_path):
    """What a step computes twice counts towards its FLOPs alone."""
    name = "NVIDIA H200"
    run_distributed(1, run, tmp_path, (f"precision.compute={compute}",), name)
    for record in read_metrics(tmp_path):
        if compute == "fp32":
            assert record["mfu"] is None
        else:
            assert 0 < record["mfu"] < record["tflops_per_gpu"] * 1e12 / PEAKS[name]["bf16"]


def spans_of(folder: Path, rank: int) -> list[str]:
    with gzip.open(folder / "profile" / f"rank_{rank}.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    marked = [event for event in events if event.get("cat") == "user_annotation" and event["name"] in Span]
    return [event["name"] for event in sorted(marked, key=lambda event: event["ts"])]


def test_a_profile_holds_its_steps_of_every_rank_and_changes_no_number(tmp_path):
    run_distributed(2, run, tmp_path / "plain", (TP2,))
    run_distributed(2, run, tmp_path / "traced", (TP2, "run.profile={steps: [2, 3]}"))
    assert not (tmp_path / "plain" / "profile").exists()
    for rank in (0, 1):
        names = spans_of(tmp_path / "traced", rank)
        assert names.count("step") == 2 and names.count("evaluation") == 1
        assert set(names) >= {"batch", "redraw", "flush", "lower backward", "upper backward", "loss", "optimizer"}
    measured = {"step_seconds", "tokens_per_second", "tflops_per_gpu"}
    plain, traced = (
        [{key: value for key, value in record.items() if key not in measured} for record in read_metrics(folder)]
        for folder in (tmp_path / "plain", tmp_path / "traced")
    )
    assert plain == traced


def test_a_run_that_ends_between_the_steps_of_its_profile_leaves_what_there_was(tmp_path):
    run_distributed(1, run, tmp_path, ("run.profile={steps: [2, 4]}",), "CPU", 2)
    assert len(read_metrics(tmp_path)) == 2 and spans_of(tmp_path, 0).count("step") == 1


@pytest.mark.parametrize(
    "profile", ["3", "{}", "{steps: 3}", "{steps: [0, 1]}", "{steps: [2, 1]}", "{steps: [1, 5]}", "{steps: [1, 2.0]}"]
    + ["{steps: [1, 2, 3]}", "{steps: [1, true]}", "{steps: [1, 2], ranks: 0}"],
)  # fmt: skip
def test_a_profile_of_no_steps_of_the_run_is_refused(profile):
    with pytest.raises(UserError, match=r"run.profile=.*two steps from 1 to bilevel.steps=4"):
        check_config(resolved(*RUN, f"run.profile={profile}"), 1, None)


def test_a_profile_is_no_part_of_what_decides_a_runs_numbers():
    plain, traced = (resolved(*RUN, *more) for more in ([], ["run.profile={steps: [1, 4]}"]))
    assert config_sha256(plain) == config_sha256(traced) and traced.run.profile == {"steps": [1, 4]}
