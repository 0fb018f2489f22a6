"""Both models in one pipeline flush: a chunk holds `lower` and `upper`, and each micro-batch names the role it runs.

The passes of a step run one after another in the flush: lower on train, upper on train, upper on validation. Any order
fills the pipeline equally, and at most `num_stages` micro-batches are in flight whatever it is; this one accumulates
each model's gradient in the order of separate flushes, so that one flush and three give the same bits, and lower's
gradient is complete while two thirds of the flush still run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from megatron_scalebio.active_layers import Role
from megatron_scalebio.bilevel import Pass
from megatron_scalebio.data.batch import MicroBatch
from megatron_scalebio.kernels.head_loss import head_loss
from megatron_scalebio.kernels.loss_sums import sums_by_id
from megatron_scalebio.losses import TokenCoefs
from megatron_scalebio.mcore.process_groups import ProcessGroups
from megatron_scalebio.mcore.schedule_spans import ScheduleSpans
from megatron_scalebio.spans import Span, profiling, span


@dataclass(frozen=True)
class Task:
    """One micro-batch of one pass, as it goes through the pipeline."""

    pass_index: int
    role: Role
    micro_batch: MicroBatch
    coefs: TokenCoefs


class DualModel(torch.nn.Module):
    """The model chunk that Megatron-Core's schedules drive: this stage of both models.

    Surface that the schedules need: `config`, `model_type`, `set_input_tensor`, and a forward that routes by role.
    """

    def __init__(self, models: dict[Role, GPTModel], groups: ProcessGroups, device: torch.device, te: bool):
        super().__init__()
        self.models = torch.nn.ModuleDict({role.value: model for role, model in models.items()})
        upper = models[Role.UPPER]
        self.config, self.model_type = upper.config, upper.model_type
        self.groups, self.device, self.te = groups, device, te
        self._input_tensor: list[Tensor | None] = []
        # Whether a stage before this one holds anything of the model that trains.
        self._trains_below = dict.fromkeys(models, not groups.is_first_stage)

    def model(self, role: Role) -> GPTModel:
        return self.models[role.value]

    def redraw(self, role: Role, active_layers: list[int], embedding: bool) -> None:
        """Tell which decoder layers of a whole model train, counted from 0, and whether its embedding does."""
        first_layer = self.model(role).decoder.layers[0].layer_number - 1
        lowest = 0 if embedding else min(active_layers)
        self._trains_below[role] = lowest < first_layer

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        self._input_tensor = input_tensor

    def forward(self, task: Task) -> Tensor | tuple[Tensor, Tensor]:
        """Hidden states [T, 1, H] for the next stage ([T / TP, 1, H] under sequence parallelism); on the last stage
        the loss and the raw token losses [N]."""
        model, micro_batch = self.model(task.role), task.micro_batch
        model.set_input_tensor(self._stage_input(task.role))
        attention, window = self.config.core_attention, self.config.sliding_window
        return model(
            input_ids=micro_batch.tokens.unsqueeze(0),
            position_ids=None,
            attention_mask=None if self.te else attention.prepare(micro_batch, window),
            packed_seq_params=_packed_for_te(micro_batch) if self.te else None,
            output_processor=self._loss if self.groups.is_last_stage else None,
            output_processor_context=task,
        )

    def _stage_input(self, role: Role) -> list[Tensor | None]:
        """What the stage before has sent; Megatron-Core marks it as needing a gradient, whatever trains there.

        Without a gradient the layers up to the lowest active one compute none. The schedule still has to send one
        down: zeros, which no stage below uses.
        """
        (received,) = self._input_tensor
        if received is None or self._trains_below[role] or not torch.is_grad_enabled():
            return [received]
        received.grad = torch.zeros_like(received)
        return [received.detach()]

    def _loss(
        self, *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, context: Task, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """GPTModel's output hook: hidden states and head weight to the weighted loss, only where a token counts."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden_states, group=self.groups.tensor)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_states, group=self.groups.tensor)
        micro_batch = context.micro_batch
        weight = output_layer.weight if output_weight is None else output_weight
        return head_loss(
            hidden.squeeze(1).index_select(0, micro_batch.loss_positions),
            weight,
            micro_batch.targets,
            context.coefs.loss_coef,
            self.config.vocab_size,
            self.groups.tensor,
            softcap=self.config.final_softcap,
            main_grad=getattr(weight, "main_grad", None),  # a frozen weight has none
        )


def _packed_for_te(micro_batch: MicroBatch) -> PackedSeqParams:
    ends, longest = micro_batch.cu_seqlens, micro_batch.row_length
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def run_flush(chunk: DualModel, passes: list[Pass], forward_only: bool = False) -> list[Tensor]:
    """Run passes through the pipeline in one flush; gradients accumulate in the active blocks.

    Returns: per pass the sums of token losses times mean_coef per source, [num_sources] fp64: this data-parallel
    rank's part on the last stage, zeros on the other stages.
    """
    groups, device = chunk.groups, chunk.device
    with span(Span.BATCH):
        tasks = [
            _to_device(Task(index, part.role, micro_batch, coefs), device, chunk.config.params_dtype)
            for index, part in enumerate(passes)
            for micro_batch, coefs in zip(part.micro_batches, part.coefs, strict=True)
        ]
    chunk.config.timers = ScheduleSpans(task.role for task in tasks) if profiling() else None
    sums = [torch.zeros(part.num_sources, dtype=torch.float64, device=device) for part in passes]

    def collect(task: Task, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, None]:
        loss, token_losses = output
        mean_coef, sources = task.coefs.mean_coef, task.micro_batch.source_ids
        sums[task.pass_index] += sums_by_id(token_losses, mean_coef, sources, len(sums[task.pass_index]))
        return loss, torch.zeros((), dtype=torch.int, device=device), None

    def forward_step(iterator: Iterator[Task], model: DualModel) -> tuple[Any, Callable[..., Any]]:
        task = next(iterator)
        return model(task), lambda output: collect(task, output)

    arguments = dict(
        forward_step_func=forward_step,
        data_iterator=iter(tasks),
        model=chunk,
        num_microbatches=len(tasks),
        seq_length=len(tasks[0].micro_batch.tokens),
        micro_batch_size=1,
        forward_only=forward_only,
        pg_collection=groups.collection,
    )
    if groups.num_stages == 1:
        forward_backward_no_pipelining(**arguments)
    else:
        communicator = P2PCommunicator(pp_group=groups.pipeline, config=chunk.config)
        forward_backward_pipelining_without_interleaving(p2p_communicator=communicator, **arguments)
    return sums


def _to_device(task: Task, device: torch.device, compute_dtype: torch.dtype) -> Task:
    loss_dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    part = task.micro_batch
    tensors: dict[str, Any] = {name: move(value) for name, value in vars(part).items() if isinstance(value, Tensor)}
    micro_batch = MicroBatch(**{**vars(part), **tensors})
    coefs = TokenCoefs(move(task.coefs.mean_coef), move(task.coefs.loss_coef.to(loss_dtype)))
    return Task(task.pass_index, task.role, micro_batch, coefs)
