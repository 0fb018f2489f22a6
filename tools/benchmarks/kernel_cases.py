"""The loss operations as benchmark cases: inputs, truth, floors, bytes and FLOPs; peers are in kernel_peers.py.

Shapes: N tokens that carry loss, H hidden, V vocabulary. One process, so that V_local is V; 19,008 is the shard of
152,064 under tensor parallelism 8.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_scalebio.device import backend
from megatron_scalebio.kernels.cross_entropy import cross_entropy
from megatron_scalebio.kernels.head_loss import head_loss
from megatron_scalebio.kernels.loss_sums import sums_by_id
from tools.benchmarks import kernel_peers
from tools.benchmarks.kernel_checks import NEAR_BANDWIDTH, RECOMPUTE, Case, Contender, Outputs, Target

ROWS_CHECKED = 128  # of a logits gradient, first and last included: an offset past 2^31 shows in the last ones
REFERENCE_CHUNK = 1024  # tokens whose fp64 logits exist at a time
NUM_SOURCES = 18


class Shape(NamedTuple):
    hidden_size: int
    vocab_size: int
    softcap: float | None = None


SHAPES = {
    "cuda": [Shape(5120, 152064), Shape(5120, 19008), Shape(4096, 128256), Shape(3584, 256000, softcap=30.0)],
    "cpu": [Shape(64, 256), Shape(64, 256, softcap=30.0)],
}
TOKENS = {"cuda": [4096, 8192, 16384], "cpu": [304]}
QUICK_TOKENS = {"cuda": [8192], "cpu": [304]}


@dataclass(frozen=True)
class LogitsInputs:
    """Of cross-entropy alone."""

    logits: Tensor  # [N, V] bf16
    targets: Tensor  # [N] int64
    loss_coef: Tensor  # [N] fp32
    grad: Tensor  # [N, V] bf16, for the gradient
    softcap: float | None


@dataclass(frozen=True)
class HeadInputs:
    """Of the head with its loss."""

    hidden: Tensor  # [N, H] bf16
    weight: Tensor  # [V, H] bf16; requires a gradient if the head trains
    targets: Tensor  # [N] int64
    loss_coef: Tensor  # [N] fp32
    main_grad: Tensor | None  # [V, H] fp32 zeros, if the head trains
    softcap: float | None


class SumsInputs(NamedTuple):
    values: Tensor  # [N] fp32
    coefs: Tensor  # [N] fp64
    ids: Tensor  # [N] int64
    num_ids: int


def single_process_group(device: torch.device) -> ProcessGroup:
    """A tensor-parallel group of this process alone."""
    if not dist.is_initialized():
        dist.init_process_group(backend(device), store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    return group


def cross_entropy_cases(device: torch.device, quick: bool) -> list[Case]:
    """Losses and the logits' gradient, from logits. Two reads and one write of the logits."""
    group = single_process_group(device)

    def ours(inputs: LogitsInputs) -> Outputs:
        vocab_size = inputs.logits.shape[1]
        losses = cross_entropy(
            *(inputs.logits, inputs.targets, inputs.loss_coef, vocab_size, group), inputs.softcap, grad=inputs.grad
        )
        return {"token_losses": losses, "grad_logits": inputs.grad}

    def case(shape: Shape, num_tokens: int) -> Case:
        rows = torch.linspace(0, num_tokens - 1, min(ROWS_CHECKED, num_tokens), device=device).long()
        return Case(
            operation="cross_entropy",
            shape=_described(N=num_tokens, V=shape.vocab_size, softcap=shape.softcap),
            make_inputs=partial(_logits_inputs, shape, num_tokens, device),
            reference=partial(_plain_cross_entropy, rows),
            ours=(Contender("ours", ours, num_bytes=3 * num_tokens * shape.vocab_size * 2),),
            peers=kernel_peers.CROSS_ENTROPY,
            targets=NEAR_BANDWIDTH,
            rows=rows,
        )

    return _at_all_shapes(case, device, quick)


def _logits_inputs(shape: Shape, num_tokens: int, device: torch.device) -> LogitsInputs:
    torch.manual_seed(0)
    logits = torch.randn(num_tokens, shape.vocab_size, dtype=torch.bfloat16, device=device).mul_(_spread(shape))
    grad = torch.full_like(logits, torch.nan)
    return LogitsInputs(logits, *_targets_and_coefs(shape, num_tokens, device), grad, shape.softcap)


def _plain_cross_entropy(rows: Tensor, inputs: LogitsInputs, exact: bool) -> Outputs:
    """In plain PyTorch, some rows only; in fp64, or in fp32 with the gradient rounded as ours is."""
    dtype = torch.float64 if exact else torch.float32
    logits = inputs.logits[rows].to(dtype).requires_grad_()
    losses = kernel_peers.token_losses(logits, inputs.targets[rows], inputs.softcap)
    (grad,) = torch.autograd.grad(losses, logits, inputs.loss_coef[rows].to(dtype))
    return {"token_losses": losses.detach(), "grad_logits": grad if exact else grad.to(inputs.logits.dtype)}


def head_loss_cases(device: torch.device, quick: bool) -> list[Case]:
    """The head's weighted loss with the gradient of the hidden states, and of a head that trains."""
    group = single_process_group(device)

    def ours(inputs: HeadInputs, main_grad: bool = False) -> Outputs:
        loss, token_losses = head_loss(
            *(inputs.hidden, inputs.weight, inputs.targets, inputs.loss_coef, len(inputs.weight), group),
            *(inputs.softcap, inputs.main_grad if main_grad else None),
        )
        grads = list(torch.autograd.grad(loss, kernel_peers.trained(inputs), allow_unused=main_grad))
        if main_grad and inputs.main_grad is not None:
            grads[1] = inputs.main_grad
        return {"loss": loss, "token_losses": token_losses, **dict(zip(kernel_peers.GRADIENTS, grads, strict=False))}

    def case(trained: bool, shape: Shape, num_tokens: int) -> Case:
        num_gemms = 3 if trained else 2
        gemms = f"its {num_gemms} GEMMs in cuBLAS"
        sizes = dict(N=num_tokens, H=shape.hidden_size, V=shape.vocab_size)
        return Case(
            operation="head_loss",
            shape=_described(**sizes, softcap=shape.softcap, head="trained" if trained else "frozen"),
            make_inputs=partial(_head_inputs, shape, num_tokens, trained, device),
            reference=_plain_head_loss,
            ours=(
                Contender("ours", ours, num_bytes=None if trained else _head_bytes(num_tokens, shape)),
                *([Contender("ours, into main_grad", partial(ours, main_grad=True))] if trained else []),
            ),
            floors=(Contender(gemms, _gemms),),
            peers=kernel_peers.HEAD_LOSS,
            flops=num_gemms * 2 * num_tokens * shape.hidden_size * shape.vocab_size,
            targets=(Target(gemms, 1.15), *(() if trained else (Target(RECOMPUTE, 0.8),))),
        )

    return [built for trained in (False, True) for built in _at_all_shapes(partial(case, trained), device, quick)]


def _head_inputs(shape: Shape, num_tokens: int, trained: bool, device: torch.device) -> HeadInputs:
    torch.manual_seed(0)
    random = partial(torch.randn, dtype=torch.bfloat16, device=device)
    hidden = random(num_tokens, shape.hidden_size).requires_grad_()
    weight = random(shape.vocab_size, shape.hidden_size).mul_(_spread(shape) / shape.hidden_size**0.5)
    main_grad = torch.zeros_like(weight, dtype=torch.float32) if trained else None
    targets, loss_coef = _targets_and_coefs(shape, num_tokens, device)
    return HeadInputs(hidden, weight.requires_grad_(trained), targets, loss_coef, main_grad, shape.softcap)


def _plain_head_loss(inputs: HeadInputs, exact: bool) -> Outputs:
    """In plain PyTorch, a chunk of tokens at a time, in fp64 or fp32. With fp32 the logits' gradient is rounded to the
    model's dtype, in which tensor cores take it; losses and sums are not: of logits in bf16 they would be."""
    dtype = torch.float64 if exact else torch.float32
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach().to(dtype)
    losses, grads_hidden, grad_weight = [], [], torch.zeros((), dtype=dtype, device=weight.device)
    for chunk, targets, coefs in zip(
        *(tensor.split(REFERENCE_CHUNK) for tensor in (hidden, inputs.targets, inputs.loss_coef)), strict=True
    ):
        rows = chunk.to(dtype)
        logits = (rows @ weight.T).requires_grad_()
        loss = kernel_peers.token_losses(logits, targets, inputs.softcap)
        (grad,) = torch.autograd.grad(loss, logits, coefs.to(dtype))
        grad = grad if exact else grad.to(hidden.dtype).to(dtype)
        losses.append(loss.detach())
        grads_hidden.append(grad @ weight)
        if inputs.weight.requires_grad:
            grad_weight = grad_weight + grad.T @ rows
    token_losses = torch.cat(losses)
    outputs = {"loss": (inputs.loss_coef.to(dtype) * token_losses).sum(), "token_losses": token_losses}
    grads = [torch.cat(grads_hidden), *([grad_weight] if inputs.weight.requires_grad else [])]
    return outputs | dict(zip(kernel_peers.GRADIENTS, grads, strict=False))


def _gemms(inputs: HeadInputs) -> Outputs:
    """The matrix products alone, of all tokens at once; the logits stand in for their gradient."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    logits = hidden @ weight.T
    outputs = {"grad_hidden": logits @ weight}
    if inputs.weight.requires_grad:
        outputs["grad_weight"] = logits.T @ hidden
    return outputs


def _head_bytes(num_tokens: int, shape: Shape) -> int:
    """Of a frozen head: logits of a chunk in fp32, written and read twice; their gradient in bf16, written and read
    once; hidden states and weight read by each product, and the hidden states' gradient written, in bf16."""
    logits = num_tokens * shape.vocab_size
    hidden, weight = num_tokens * shape.hidden_size, shape.vocab_size * shape.hidden_size
    return 3 * 4 * logits + 2 * 2 * logits + 2 * (2 * hidden + 2 * weight)


def sums_by_id_cases(device: torch.device, quick: bool) -> list[Case]:
    """Losses per source of 16,384 tokens. So small that what it takes to launch is what counts."""
    num_tokens = 16384

    def make_inputs() -> SumsInputs:
        torch.manual_seed(0)
        ids = torch.randint(NUM_SOURCES, (num_tokens,), device=device)
        coefs = torch.rand(num_tokens, dtype=torch.float64, device=device)
        return SumsInputs(torch.randn(num_tokens, device=device) + 2, coefs, ids, NUM_SOURCES)

    def reference(inputs: SumsInputs, exact: bool) -> Outputs:
        products = inputs.values.double() * inputs.coefs
        return {"sums": torch.stack([products[inputs.ids == index].sum() for index in range(NUM_SOURCES)])}

    case = Case(
        operation="sums_by_id",
        shape=dict(N=num_tokens, ids=NUM_SOURCES),
        make_inputs=make_inputs,
        reference=reference,
        ours=(Contender("ours", lambda inputs: {"sums": sums_by_id(*inputs)}, num_bytes=num_tokens * (4 + 8 + 8)),),
        peers=kernel_peers.SUMS_BY_ID,
    )
    return [case]


def _at_all_shapes(case: Callable[..., Case], device: torch.device, quick: bool) -> list[Case]:
    tokens = (QUICK_TOKENS if quick else TOKENS)[device.type]
    return [case(shape, num_tokens) for shape in SHAPES[device.type] for num_tokens in tokens]


def _targets_and_coefs(shape: Shape, num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Coefficients a factor of ten apart, as those of sources with unequal weights are."""
    targets = torch.randint(shape.vocab_size, (num_tokens,), device=device)
    return targets, 10 ** -torch.rand(num_tokens, device=device)


def _spread(shape: Shape) -> float:
    """Standard deviation of the logits: a softmax that is neither flat nor one-hot; with a cap, one that it bends."""
    return 8.0 if shape.softcap else 3.0


def _described(softcap: float | None, **shape: int | str) -> dict[str, int | float | str]:
    return shape | ({"softcap": softcap} if softcap else {})
