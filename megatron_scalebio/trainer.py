"""The loop: when to step, evaluate, log and save. What a step computes is in bilevel.py."""

import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scalebio.active_layers import Role, draw_active_layers, period_of
from megatron_scalebio.bilevel import Bilevel, NonFinite, StepResult, evaluation_pass
from megatron_scalebio.checkpoint import load_models, newest_checkpoint, read_state, save_checkpoint
from megatron_scalebio.config import Config, UserError
from megatron_scalebio.config.evaluation_sets import names_of_sets
from megatron_scalebio.data import Sampler, StepBatch
from megatron_scalebio.device import choose_device, device_name, peak_memory, read_back, reset_peak_memory
from megatron_scalebio.hf import model_card
from megatron_scalebio.mcore.attention import choose_attention
from megatron_scalebio.mcore.export import export_model
from megatron_scalebio.mcore.models import MegatronModels
from megatron_scalebio.mcore.parameters import NamedParameter
from megatron_scalebio.mcore.process_groups import start_process_groups
from megatron_scalebio.plan.utilization import batch_flops, peak_flops
from megatron_scalebio.run import Run
from megatron_scalebio.run_folder import RunFolder
from megatron_scalebio.show.record import StepRecord
from megatron_scalebio.show.step_trace import StepTrace
from megatron_scalebio.show.writers import MetricsWriter
from megatron_scalebio.source_weights import SourceWeights
from megatron_scalebio.spans import Span, span


def train(run: Run) -> int:
    """Run to the last step, or until a signal. Returns the exit status: 0, 1, 130 or 143."""
    with _StopSignal() as stop:  # a signal that arrives while the models are built ends the run after its first step
        status = Trainer(run).train(stop)
    dist.destroy_process_group()
    return status


class Trainer:
    """One run on one rank: models, source weights and data, at the step after which they stand.

        trainer = Trainer(open_run("FILE.yaml"))
        trainer.train()
        trainer.weights  # {"clean": 0.98, "noisy": 0.02}

    Args:
        initial_weights: see `MegatronModels`.
    """

    def __init__(self, run: Run, initial_weights: Callable[[NamedParameter], Tensor] | None = None):
        config, dataset = self.config, self.dataset = run.config, run.dataset
        self.folder = RunFolder(Path(config.run.output_dir))
        self.device = choose_device(config.run.device)
        self.groups = start_process_groups(config.parallel, self.device)
        self.sampler = Sampler(dataset, config, self.groups.data.rank(), self.groups.data.size())
        checkpoint = newest_checkpoint(config) if config.run.resume == "auto" else None
        self.models = MegatronModels(config, self.groups, self.device, initial_weights, loads=checkpoint is None)
        if self.groups.rank == 0:
            print(f"attention: {choose_attention(config.model, self.device, self.models.dtype).line}")
        self.source_weights = make_source_weights(config, dataset.source_names)
        self.bilevel = Bilevel(config, self.source_weights)
        self.step = 0
        self.active_layers: dict[Role, list[int]] = {}
        if checkpoint is not None:
            self._resume(checkpoint)
        if config.run.resume == "auto" and self.groups.rank == 0:
            where = self.folder.checkpoints
            print(f"resumed after step {self.step}" if checkpoint else f"no checkpoint in {where}: starts anew")

    @property
    def weights(self) -> dict[str, float]:
        """How much each source counts: {name: weight}, which sum to one."""
        return dict(zip(self.dataset.source_names, self.source_weights.weights.tolist(), strict=True))

    def train(self, stop: "_StopSignal | None" = None) -> int:
        """Run to the last step and export the model, or save a checkpoint at a signal. Returns the exit status: 0; 1 if
        the run diverged, 130 after SIGINT, 143 after SIGTERM.

        Args:
            stop: watches for signals already; None: for as long as this runs.
        """
        with _StopSignal() if stop is None else nullcontext(stop) as watched:
            return self._loop(watched)

    def _loop(self, stop: "_StopSignal") -> int:
        config, num_steps = self.config, self.config.bilevel.steps
        counts = self.dataset.num_examples, self.dataset.num_duplicates
        writer = MetricsWriter(config, *counts, self.step, self.groups.rank == 0)
        with writer as metrics, StepTrace(config.run, self.groups.rank, self.device) as trace:
            done = self.step == num_steps or self._settled(metrics)
            while not done:
                trace.begin(self.step + 1)
                try:
                    done, stopped_by = self._step_and_record(metrics, stop)
                except NonFinite as error:
                    # No checkpoint: a run that diverged would continue into the same numbers from it.
                    self._tell_non_finite(error)
                    return 1
                trace.end(self.step)
                if (done and config.run.save_last) or stopped_by or _due(self.step, config.run.save_every):
                    self.save()
                if stopped_by and not done:
                    return 128 + stopped_by
        statuses = [self._export(role) for role in self._exported()] if config.run.export else []
        return max(statuses, default=0)

    def _step_and_record(self, metrics: MetricsWriter, stop: "_StopSignal") -> tuple[bool, int]:
        """Returns whether this step was the last, and the signal that any rank has received, 0 for none."""
        config = self.config
        reset_peak_memory(self.device)
        with span(Span.STEP):
            record = self.record(*self.take_step())
        done = self.step == config.bilevel.steps or self._settled(metrics, record.weights)
        try:
            if self.dataset.test and (done or _due(self.step, config.run.eval_every)):
                losses = self.evaluate_sets()
                by_set = _by_set(config.data.test, losses)
                record = replace(record, test_loss=float(self._test_weights @ losses), test_losses=by_set or None)
                if Role.LOWER in self._exported():
                    record = replace(record, test_loss_lower=self.evaluate(Role.LOWER))
            stopped_by, peak = stop.agreed(self.device, record.peak_memory_bytes)
            record = replace(record, peak_memory_bytes=peak)
        finally:
            metrics.record(record)
        return done, stopped_by

    def _settled(self, metrics: MetricsWriter, *coming: dict[str, float]) -> bool:
        """Whether the run ends here because its weights have settled; equal on every rank."""
        if self.config.run.stop == "steps":
            return False
        settled = [metrics.settled(*coming)]
        dist.broadcast_object_list(settled)
        return settled[0]

    def take_step(self) -> tuple[StepBatch, StepResult]:
        """One step of both models and the logits, on the step's own examples and active layers."""
        self._began = time.perf_counter()
        step = self.step + 1
        self._redraw(self._draw(step))
        with span(Span.BATCH):
            batch = self.sampler.step(step, self.source_weights.weights.tolist())
        result = self.bilevel.step(self.models, step, batch, self.active_layers)
        self.step = step
        return batch, result

    def evaluate(self, role: Role = Role.UPPER) -> float:
        """Mean loss of a model over the test set's loss tokens; of several sets by their weights."""
        return float(self._test_weights @ self.evaluate_sets(role))

    def evaluate_sets(self, role: Role = Role.UPPER) -> Tensor:
        """Mean loss of a model over each test set's loss tokens, [sets] fp64."""
        with span(Span.EVALUATION):
            micro_batches, counts = self.sampler.test_batch()
            part = evaluation_pass("test", micro_batches, counts, self._test_weights, "token", role)
            return self.models.evaluate(part)

    @property
    def _test_weights(self) -> Tensor:
        return torch.tensor(self.sampler.test_weights, dtype=torch.float64)

    def _exported(self) -> list[Role]:
        which = self.config.run.export_model
        return list(Role) if which == "both" else [Role(which)]

    def _export(self, role: Role) -> int:
        """Write a model to its folder. Returns the exit status: the run has its result whatever happens."""
        folder = self.folder.exported(role)
        there = [folder.exists()]
        dist.broadcast_object_list(there)
        try:
            if not there[0]:
                card = model_card(self.config, role, self.step, self.weights, self.dataset.num_examples)
                export_model(self.models, folder, self.dataset.tokenizer.end_id, role, card)
            elif self.groups.rank == 0:
                print(
                    f"{folder} is there already, and is kept as it is: should it not be of step {self.step}, which its"
                    " README.md says, move it away and run again with run.resume=auto"
                )
        except UserError as error:
            if self.groups.rank == 0:
                print(f"error: {error}; run.resume=auto tries again", file=sys.stderr, flush=True)
            return 1
        return 0

    def save(self) -> None:
        """Write a checkpoint of the state after the last step taken."""
        run_state = {
            "source_weights": self.source_weights.state_dict(),
            "sampler": self.sampler.state_dict(),
            "active_layers": self.active_layers,
        }
        save_checkpoint(self.config, self.step, self.dataset.fingerprint, run_state, self.models.persistence)

    def record(self, batch: StepBatch, result: StepResult) -> StepRecord:
        """The record of the step that was just taken, with numbers per source by the sources' names; the peak of memory
        is this rank's."""
        config, names = self.config, self.dataset.source_names
        roles = list(result.grad_norm)
        norms = dict(zip(roles, read_back(torch.stack([result.grad_norm[role] for role in roles])), strict=True))
        seconds = time.perf_counter() - self._began  # the device has done the step: the norms are the last of it
        active = [self.active_layers[role] for role in roles]
        flops = batch_flops(config, active, batch)
        rank_seconds = seconds * self.groups.world_size
        peak = peak_flops(device_name(self.device), config.precision.compute)

        def by_name(values: torch.Tensor | None) -> dict[str, float]:
            return {} if values is None else dict(zip(names, values.tolist(), strict=True))

        def losses(role: Role) -> dict[str, float | None]:
            values = by_name(result.train_loss.get(role))
            present = dict(zip(names, batch.num_examples, strict=True))
            return {name: loss if present[name] else None for name, loss in values.items()}

        return StepRecord(
            step=self.step,
            weights=by_name(self.source_weights.weights),
            logits=by_name(self.source_weights.logits),
            train_loss_lower=losses(Role.LOWER),
            train_loss_upper=losses(Role.UPPER),
            val_loss=result.validation_loss,
            penalty_gap=result.penalty_gap,
            penalty_alpha=result.penalty_alpha,
            hypergradient=by_name(result.hypergradient),
            signal_to_noise=by_name(result.signal_to_noise),
            grad_norm_lower=norms.get(Role.LOWER),
            grad_norm_upper=norms[Role.UPPER],
            lr=result.lr,
            logits_lr=result.logits_lr,
            active_layers={role.value: self.active_layers[role] for role in roles},
            num_tokens=batch.num_tokens,
            num_loss_tokens=sum(batch.num_loss_tokens) + sum(batch.num_validation_loss_tokens),
            step_seconds=seconds,
            tokens_per_second=batch.num_tokens / seconds,
            tflops_per_gpu=flops.executed / rank_seconds / 1e12,
            mfu=None if peak is None else flops.model / rank_seconds / peak,
            num_examples=dict(zip(names, batch.num_examples, strict=True)),
            val_losses=_by_set(config.data.validation, result.validation_losses),
            kept={} if config.data.max_epochs is None else dict(zip(names, batch.kept, strict=True)),
            flops=flops.executed,
            peak_memory_bytes=peak_memory(self.device),
        )

    def _draw(self, step: int) -> dict[Role, list[int]]:
        shape, lisa, seed = self.config.model.shape, self.config.lisa, self.config.run.seed
        return draw_active_layers(lisa, shape.num_layers, seed, period_of(step, lisa))

    def _redraw(self, drawn: dict[Role, list[int]]) -> None:
        if drawn != self.active_layers:
            self.active_layers = drawn
            self.models.redraw(drawn)

    def _resume(self, checkpoint: Path) -> None:
        state = read_state(checkpoint, self.config, self.dataset.fingerprint)
        self._redraw({Role(role): layers for role, layers in state["active_layers"].items()})
        load_models(checkpoint, state, self.models.persistence)
        self.source_weights.load_state_dict(state["source_weights"])
        self.sampler.load_state_dict(state.get("sampler"))
        self.step = state["step"]

    def _tell_non_finite(self, error: NonFinite) -> None:
        if self.groups.rank == 0:
            data = self.config.data
            names = {"train": self.dataset.source_names}
            sets = {"validation": data.validation, "test": data.test}
            names |= {split: names_of_sets(value) for split, value in sets.items() if isinstance(value, list)}
            evaluated = any(part.split == "test" for part in error.passes)
            when = f"step {self.step}, evaluation" if evaluated else f"step {self.step + 1}, before any update"
            print(f"error: {when}: {error.describe(names)}", file=sys.stderr, flush=True)


def make_source_weights(config: Config, source_names: list[str]) -> SourceWeights:
    """The logits of a run before its first step."""
    bilevel = config.bilevel
    beta1, beta2 = config.optimizer.betas

    def in_order(mapping: dict[str, float] | None) -> list[float] | None:
        return None if mapping is None else [mapping[name] for name in source_names]

    return SourceWeights(
        num_sources=len(source_names),
        optimizer=bilevel.logits_optimizer,
        weight_decay=bilevel.logits_weight_decay,
        betas=(beta1, beta2),
        eps=config.optimizer.eps,
        floor=bilevel.floor if bilevel.mode == "bilevel" else 0.0,
        gate=bilevel.logits_gate,
        clip=bilevel.logits_clip,
        prior=in_order(bilevel.prior),
        start=in_order(bilevel.weights),
    )


def _by_set(value: Any, losses: Tensor | None) -> dict[str, float]:
    """{name: loss} of the sets of `data.validation` or `data.test`, where there are several."""
    several = losses is not None and isinstance(value, list)
    return dict(zip(names_of_sets(value), losses.tolist(), strict=True)) if several else {}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _StopSignal:
    """SIGINT and SIGTERM end the run after the step at hand, with a checkpoint; a second one ends it at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> "_StopSignal":
        self.received = 0
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, device: torch.device, peak_memory_bytes: int) -> tuple[int, int]:
        """The signal that any rank has received, 0 for none, and the most bytes of any; equal on every rank."""
        numbers = torch.tensor([self.received, peak_memory_bytes], device=device)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        received, peak = map(int, read_back(numbers))
        return received, peak

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each, handler in self._previous.items():
            signal.signal(each, handler)
