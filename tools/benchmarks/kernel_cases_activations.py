"""The operation between a gated MLP's matrices as benchmark cases.

Shapes: R rows (tokens), F feed-forward.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_scalebio.kernels.gated_activation import gated_activation
from tools.benchmarks import kernel_peers
from tools.benchmarks.kernel_checks import NEAR_BANDWIDTH, Case, Contender, Outputs

# F and the activation: of Qwen2.5-32B whole, of one of its 8 tensor-parallel shards, and of Gemma-2-9B.
LAYERS = {
    "cuda": [(27648, "silu"), (3456, "silu"), (14336, "gelu_tanh")],
    "cpu": [(96, "silu"), (96, "gelu_tanh")],
}
NUM_ROWS = {"cuda": 8192, "cpu": 48}


class ActivationInputs(NamedTuple):
    gate_and_up: Tensor  # [R, 2 F] bf16, requires a gradient
    grad: Tensor  # [R, F] bf16, of the result
    activation: str


def gated_activation_cases(device: torch.device, quick: bool) -> list[Case]:
    """Forward 2 numbers read and 1 written for each of the result's, backward 3 and 2."""
    rows = NUM_ROWS[device.type]
    ours = partial(kernel_peers.gated_activation_outputs, gated_activation)

    def make_inputs(features: int, activation: str) -> ActivationInputs:
        torch.manual_seed(0)
        random = partial(torch.randn, dtype=torch.bfloat16, device=device)
        return ActivationInputs(random(rows, 2 * features).mul_(2).requires_grad_(), random(rows, features), activation)

    return [
        Case(
            operation="gated_activation",
            shape=dict(R=rows, F=features, activation=activation),
            make_inputs=partial(make_inputs, features, activation),
            reference=_plain,
            ours=(Contender("ours", ours, num_bytes=8 * rows * features * 2),),
            peers=kernel_peers.GATED_ACTIVATION,
            targets=NEAR_BANDWIDTH,
        )
        for features, activation in LAYERS[device.type]
    ]


def _plain(inputs: ActivationInputs, exact: bool) -> Outputs:
    """In plain PyTorch, in fp64 or in bf16."""
    dtype = torch.float64 if exact else torch.bfloat16
    gate_and_up = inputs.gate_and_up.detach().to(dtype).requires_grad_()
    converted = inputs._replace(gate_and_up=gate_and_up, grad=inputs.grad.to(dtype))
    return kernel_peers.gated_activation_outputs(kernel_peers.plain_gated_activation, converted)
