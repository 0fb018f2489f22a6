"""The same operations as others have them, called in the way that gives every token its own coefficient.

Whatever is not installed, or cannot do a shape, raises; the benchmark then lists it with the reason. Versions read:
liger-kernel 0.8.5, cut-cross-entropy 25.1.1, quack-kernels 0.6.5, Transformer Engine 2.20, torch 2.13.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

from megatron_scalebio.kernels.adamw import adamw_update_reference
from megatron_scalebio.kernels.fp8 import BlockScaled, quantize, transpose
from megatron_scalebio.kernels.gated_activation import ACTIVATIONS
from tools.benchmarks.kernel_checks import Contender, Outputs, Unsupported

GRADIENTS = ("grad_hidden", "grad_weight")


def token_losses(logits: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """[N] in fp32 at least, in plain PyTorch."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="none")


def head_token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    return token_losses(F.linear(hidden, weight), targets, softcap)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile, anew for every shape; on a CPU, where times mean nothing, without the C++ compiler."""

    @functools.cache
    def on(device_type: str) -> Callable[..., Any]:
        torch._dynamo.config.recompile_limit = 256  # beyond it torch.compile goes on uncompiled, in silence
        return torch.compile(function, dynamic=False, backend="inductor" if device_type == "cuda" else "aot_eager")

    return lambda first, *args, **keywords: on(first.device.type)(first, *args, **keywords)


def refuse_softcap(softcap: float | None) -> None:
    if softcap is not None:
        raise Unsupported("has no softcap")


def _from_logits(losses: Callable[[Tensor, Tensor, float | None], Tensor]) -> Callable[[Any], Outputs]:
    """The contender's `run` of a function of (logits, targets, softcap) -> token losses."""

    def run(inputs: Any) -> Outputs:
        logits = inputs.logits.detach().requires_grad_()
        per_token = losses(logits, inputs.targets, inputs.softcap)
        (grad,) = torch.autograd.grad(per_token, logits, inputs.loss_coef.to(per_token.dtype))
        return {"token_losses": per_token.detach(), "grad_logits": grad}

    return run


def _liger_cross_entropy(logits: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """Writes the gradient over the logits, and multiplies by the coefficients in a pass of its own."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    arguments = (None, -100, 0.0, 0.0, "none", softcap)  # class weights, ignore_index, z-loss, smoothing
    return LigerCrossEntropyFunction.apply(logits, targets, *arguments)[0]


def _quack_cross_entropy(logits: Tensor, targets: Tensor, softcap: float | None, over_logits: bool = False) -> Tensor:
    """Args: over_logits: write the gradient over them."""
    from quack.cross_entropy import cross_entropy

    refuse_softcap(softcap)
    return cross_entropy(logits, targets, reduction="none", **({"inplace_backward": True} if over_logits else {}))


CROSS_ENTROPY = (
    Contender("torch", _from_logits(token_losses)),
    Contender("torch.compile", _from_logits(compiled(token_losses))),
    Contender("Liger", _from_logits(_liger_cross_entropy)),
    Contender("QuACK", _from_logits(_quack_cross_entropy)),
)


def trained(inputs: Any) -> list[Tensor]:
    """What the head's loss is differentiated by."""
    return [inputs.hidden, *([inputs.weight] if inputs.weight.requires_grad else [])]


def _from_hidden(losses: Callable[[Tensor, Tensor, Tensor, float | None], Tensor]) -> Callable[[Any], Outputs]:
    """The contender's `run` of a function of (hidden, weight, targets, softcap) -> token losses."""

    def run(inputs: Any) -> Outputs:
        per_token = losses(inputs.hidden, inputs.weight, inputs.targets, inputs.softcap)
        loss = (inputs.loss_coef * per_token).sum()
        grads = torch.autograd.grad(loss, trained(inputs))
        return {"loss": loss, "token_losses": per_token.detach(), **dict(zip(GRADIENTS, grads, strict=False))}

    return run


def _torch_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, tokens_per_chunk: int | None = None
) -> Tensor:
    """In chunks of tokens, its own choice of some hundreds or ours. Its token losses are bf16."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unsupported(f"torch {torch.__version__} does not have it")
    refuse_softcap(softcap)
    chunks: dict[str, Any] = (
        {} if tokens_per_chunk is None else dict(batch_chunk_size=tokens_per_chunk, chunking_method=None)
    )
    options = torch.nn.LinearCrossEntropyOptions(**chunks)
    return F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


def _liger_head(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """With the weight's gradient added up in fp32 over its chunks, as it should be."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    arguments = (None, None, -100, 0.0, 0.0, "none", softcap, False, torch.float32)
    return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets, *arguments)[0]


def _cut_cross_entropy_head(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """Every gradient computed. By default it leaves out blocks of small ones, as many as the model is sure of itself:
    a saving that random numbers cannot show."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets, softcap=softcap, reduction="none", filter_eps=None)


def _quack_head(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """cuBLAS, and its cross-entropy on the logits of all tokens, with the gradient written over them."""
    return _quack_cross_entropy(F.linear(hidden, weight), targets, softcap, over_logits=True)


def _quack_chunked_head(*_: Any) -> Tensor:
    raise Unsupported("its reduction is mean or sum: no coefficient per token")


_torch_in_large_chunks = partial(_torch_linear_cross_entropy, tokens_per_chunk=4096)
HEAD_LOSS = (
    Contender("torch", _from_hidden(head_token_losses)),
    Contender("torch.compile", _from_hidden(compiled(head_token_losses))),
    Contender("torch linear_cross_entropy", _from_hidden(_torch_linear_cross_entropy), recomputes=True),
    Contender("the same, chunks of 4,096", _from_hidden(_torch_in_large_chunks), recomputes=True),
    Contender("Liger", _from_hidden(_liger_head), recomputes=True),
    Contender("cut-cross-entropy", _from_hidden(_cut_cross_entropy_head), recomputes=True),
    Contender("QuACK, unfused", _from_hidden(_quack_head)),
    Contender("QuACK, chunked", _from_hidden(_quack_chunked_head)),
)


def _index_add_sums(inputs: Any) -> Outputs:
    sums = torch.zeros(inputs.num_ids, dtype=torch.float64, device=inputs.values.device)
    return {"sums": sums.index_add_(0, inputs.ids, inputs.values.double() * inputs.coefs)}


SUMS_BY_ID = (Contender("torch index_add_ (atomics)", _index_add_sums),)

ADAMW_SETTINGS: dict[str, Any] = dict(step=10, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
UPDATED = ("weights", "master", "exp_avg", "exp_avg_sq")


def update_outputs(inputs: Any) -> Outputs:
    return {name: getattr(inputs, name) for name in UPDATED}


def update(operation: Callable[..., None], inputs: Any) -> Outputs:
    """By a function that is called as `adamw_update` is."""
    tensors = (inputs.weights, inputs.master, inputs.gradient, inputs.exp_avg, inputs.exp_avg_sq)
    operation(*tensors, num_decayed=inputs.num_decayed, gradient_scale=inputs.gradient_scale, **ADAMW_SETTINGS)
    return update_outputs(inputs)


def _decay_groups(inputs: Any) -> list[tuple[float, list[Tensor]]]:
    """(weight decay, [master, gradient, exp_avg, exp_avg_sq, weights]) of the parameters with and without decay."""
    tensors = (inputs.master, inputs.gradient, inputs.exp_avg, inputs.exp_avg_sq, inputs.weights)
    groups = (ADAMW_SETTINGS["weight_decay"], slice(inputs.num_decayed)), (0.0, slice(inputs.num_decayed, None))
    return [(decay, [tensor[part] for tensor in tensors]) for decay, part in groups]


def _torch_adamw(inputs: Any, fused: bool) -> Outputs:
    """torch.optim's, then the cast. The fused one scales the gradient itself, and writes it back scaled."""
    device = inputs.master.device if fused else "cpu"
    beta1, beta2 = ADAMW_SETTINGS["betas"]
    if not fused:
        inputs.gradient.mul_(inputs.gradient_scale)
    for weight_decay, (master, gradient, exp_avg, exp_avg_sq, weights) in _decay_groups(inputs):
        steps = torch.full((), ADAMW_SETTINGS["step"] - 1.0, device=device)  # a tensor of a number would wait
        adamw(
            *([master], [gradient], [exp_avg], [exp_avg_sq], [], [steps]),
            **dict(fused=fused, foreach=not fused, grad_scale=1 / inputs.gradient_scale if fused else None),
            **dict(amsgrad=False, maximize=False, beta1=beta1, beta2=beta2, weight_decay=weight_decay),
            **{name: ADAMW_SETTINGS[name] for name in ("lr", "eps")},
        )
        weights.copy_(master)
    return update_outputs(inputs)


def _transformer_engine_adamw(inputs: Any) -> Outputs:
    """Its multi-tensor kernel with masters. Megatron-Core, too, scales the gradient in a pass before it."""
    from transformer_engine.pytorch.optimizers import multi_tensor_adam, multi_tensor_applier

    inputs.gradient.mul_(inputs.gradient_scale)
    overflow = torch.zeros(1, dtype=torch.int32, device=inputs.master.device)
    decoupled, bias_correction = 1, 1
    settings = [ADAMW_SETTINGS[name] for name in ("eps", "step")]
    for weight_decay, (master, gradient, exp_avg, exp_avg_sq, weights) in _decay_groups(inputs):
        multi_tensor_applier(
            *(multi_tensor_adam, overflow, [[gradient], [weights], [exp_avg], [exp_avg_sq], [master]]),
            *(ADAMW_SETTINGS["lr"], *ADAMW_SETTINGS["betas"], *settings, decoupled, bias_correction, weight_decay),
        )
    return update_outputs(inputs)


ADAMW = (
    Contender("torch", partial(update, adamw_update_reference)),
    Contender("torch.compile", partial(update, compiled(adamw_update_reference))),
    Contender("torch, foreach, and a cast", partial(_torch_adamw, fused=False)),
    Contender("torch, fused, and a cast", partial(_torch_adamw, fused=True)),
    Contender("Transformer Engine", _transformer_engine_adamw),
)


def _vector_norm(dtype: torch.dtype) -> Callable[[Tensor], Outputs]:
    return lambda gradient: {"sum": torch.linalg.vector_norm(gradient, dtype=dtype) ** 2}


SUM_OF_SQUARES = (
    Contender("torch vector_norm in fp32", _vector_norm(torch.float32)),
    Contender("torch vector_norm in fp64", _vector_norm(torch.float64)),
)


def scaled_mm(x: BlockScaled, w: BlockScaled) -> Tensor:
    """`x @ w.T` in bf16 by cuBLAS, which wants the scales with the summed dimension outermost for 1x128 blocks, and
    for 128x128 blocks innermost and padded to a multiple of 4."""
    recipe = F.ScalingType
    w_scale = F.pad(w.scale, (0, -w.scale.shape[1] % 4)).contiguous().T
    return F.scaled_mm(x.data, w.data.T, x.scale, recipe.BlockWise1x128, w_scale, recipe.BlockWise128x128)


def _torch_scaled_linear(inputs: Any) -> Outputs:
    """torch has no quantiser: ours, and our transpose."""
    y = scaled_mm(quantize(inputs.x.detach(), 1), inputs.weight)
    return {"y": y, "grad_x": scaled_mm(quantize(inputs.grad, 1), transpose(inputs.weight))}


FROZEN_LINEAR = (Contender("torch scaled_mm", _torch_scaled_linear),)


def plain_gated_activation(gate_and_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


def gated_activation_outputs(operation: Callable[[Tensor, str], Tensor], inputs: Any) -> Outputs:
    """Of a function of (gate and up, activation)."""
    result = operation(inputs.gate_and_up, inputs.activation)
    (gradient,) = torch.autograd.grad(result, inputs.gate_and_up, inputs.grad)
    return {"result": result.detach(), "grad_gate_and_up": gradient}


def _liger_gated_activation(gate_and_up: Tensor, activation: str) -> Tensor:
    """Takes gate and up apart, in memory of their own."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    function = LigerSiLUMulFunction if activation == "silu" else LigerGELUMulFunction
    return function.apply(*(half.contiguous() for half in gate_and_up.chunk(2, dim=-1)))


GATED_ACTIVATION = (
    Contender("torch", partial(gated_activation_outputs, plain_gated_activation)),
    Contender("torch.compile", partial(gated_activation_outputs, compiled(plain_gated_activation))),
    Contender("Liger", partial(gated_activation_outputs, _liger_gated_activation)),
)
