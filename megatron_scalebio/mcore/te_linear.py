"""FP8 products of the linears that train, by Transformer Engine: `precision.compute=fp8`.

Weights, masters, activations and what travels between ranks are as under bf16; the three products of a linear, forward
and of both gradients, run in FP8. Of its recipes those are offered whose scales are functions of the tensors alone:

    blockwise   one scale per 1x128 numbers, of weights per 128x128
    tensorwise  one scale per tensor, of its current largest number

Delayed scaling is not: its scales follow from what each model saw before, so lower and upper would round equal weights
differently, and the hypergradient is a difference of nearly equal losses.

A frozen weight never comes here: it has FP8 products of its own (`frozen_linear`), or bf16 ones. Transformer Engine
would keep its FP8 copies, two on Hopper, from the forward pass to the backward pass.

These products have not run on a GPU yet. What is called was read in Transformer Engine 2.20, and
tools/benchmarks/te_fp8.sh is the check to run first.

Shapes: T tokens of a micro-batch, K input features, N output features, of this rank's shard.
"""

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_scalebio.config import PrecisionConfig, UserError


class FP8Product:
    """`x @ weight.T` in FP8, for a weight that trains: its gradient is added to `weight.main_grad`.

    Args:
        weight: [N, K], bf16, N and K multiples of 16. It is used, not copied: what it holds when it is called counts.
        recipe: blockwise | tensorwise.
    """

    def __init__(self, weight: Parameter, recipe: str):
        # Optional, and takes seconds to import.
        import transformer_engine.pytorch as te
        from transformer_engine.common.recipe import Float8BlockScaling, Float8CurrentScaling

        self.autocast = te.autocast
        self.recipe = {"blockwise": Float8BlockScaling, "tensorwise": Float8CurrentScaling}[recipe]()
        rows, columns = weight.shape
        self.linear = te.Linear(
            *(columns, rows),
            bias=False,
            params_dtype=weight.dtype,
            device="meta",  # its own weight, which gives way to ours, takes no memory
            fuse_wgrad_accumulation=True,
        )
        self.linear.weight = weight
        # It then rounds the weight again for the backward pass, as it must where FSDP2 has freed it, instead of keeping
        # two FP8 copies of it for every micro-batch in flight.
        self.linear._is_fsdp2 = True

    def __call__(self, x: Tensor) -> Tensor:
        """[T, 1, K] -> [T, 1, N] in the dtype of `x`. T must be a multiple of 16."""
        with self.autocast(enabled=True, recipe=self.recipe):
            return self.linear(x)  # without `is_first_microbatch` no FP8 weight is kept for the next micro-batch


def check_transformer_engine(precision: PrecisionConfig) -> None:
    """Check that this machine runs `precision.compute=fp8`, where that is set. Raises: UserError."""
    if precision.compute != "fp8":
        return
    named = f"precision.compute=fp8 with precision.fp8_recipe={precision.fp8_recipe}"
    instead = "use precision.compute=bf16, with which precision.frozen_weights=fp8 works, too"
    if not torch.cuda.is_available():
        raise UserError(f"{named} needs a GPU, and torch finds no CUDA device on this machine; {instead}")
    try:
        import transformer_engine.pytorch as te
    except (ImportError, OSError, RuntimeError) as error:  # absent, built for another torch, or without its libraries
        raise UserError(
            f"{named} needs Transformer Engine, which cannot be imported ({error}); run in NVIDIA's PyTorch container,"
            f" or {instead}"
        ) from error
    is_available = {"blockwise": te.is_fp8_block_scaling_available, "tensorwise": te.is_fp8_available}
    available, reason = is_available[precision.fp8_recipe](return_reason=True)
    if not available:
        other = "try precision.fp8_recipe=tensorwise, or " if precision.fp8_recipe == "blockwise" else ""
        name, capability = torch.cuda.get_device_name(), ".".join(map(str, torch.cuda.get_device_capability()))
        raise UserError(
            f"{named}: {reason} This is {name}, compute capability {capability}, CUDA {torch.version.cuda}; {other}"
            f"{instead}"
        )
