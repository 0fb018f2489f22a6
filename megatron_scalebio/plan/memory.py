"""Bytes that the passes of a step hold on a rank's device beside weights and optimizer state, as plain arithmetic.

What autograd keeps was listed with `torch.autograd.graph.saved_tensors_hooks` on the native modules, and is checked
against the whole step on fake tensors (`mcore.rehearsal`). With T positions of a micro-batch, on one of TP ranks
(T / TP of them for what sequence parallelism scatters), a decoder layer that a gradient passes through keeps

    norms      their inputs [T, H], and one fp32 number per row
    attention  queries and keys after the rotation, their cosines and sines, the output of the qkv linear (values are a
               view of it), the attention's output, and one fp32 number per query and head
               where each head is normed, the queries before that (keys are a view), and one number per head
    MLP        gate and up as one tensor [T, 2 F]

and if it trains also the inputs of qkv and fc1, which are the norms' outputs, and of fc2. A layer that no gradient
reaches keeps nothing. H hidden, F feed-forward size of this rank, V padded vocabulary of this rank.
"""

from collections.abc import Collection
from dataclasses import dataclass

from megatron_scalebio.anatomy import FAMILIES, head_size
from megatron_scalebio.anatomy.decoder import EMBEDDING, FC1, FC2, HEAD, PROJ, QKV
from megatron_scalebio.config import Config
from megatron_scalebio.plan.sizes import (
    GIB,
    WEIGHT_BYTES,
    linear_shapes,
    lowest_reached,
    stage_layers,
)

LOGITS_CHUNK = 4096  # loss tokens whose logits exist at a time (kernels/head_loss.py, TOKENS_PER_CHUNK on CUDA)

# Stated, not computed: what is no tensor of ours. All three are assumptions.
CUDA_CONTEXT = int(0.75 * GIB)  # driver, kernels, library handles and their workspaces
NCCL_COMMUNICATOR = GIB // 4  # buffers of one communicator on one rank
FRAGMENTATION = 0.05  # of what comes and goes during a step


@dataclass(frozen=True)
class _Sizes:
    """Bytes of a micro-batch's tensors on one rank, in the compute dtype unless told otherwise."""

    whole: int  # [T, H]
    residual: int  # [T, H], scattered under sequence parallelism
    statistics: int  # fp32 numbers of one norm
    norm_input: int  # what one norm keeps of its input
    qkv: int
    attention: int  # all that an attention keeps
    feed_forward: int  # [T, F]


def _sizes(config: Config) -> _Sizes:
    shape, parallel = config.model.shape, config.parallel
    number, positions = WEIGHT_BYTES[config.precision.compute], config.data.micro_batch_size * config.data.max_length
    scattered = positions // parallel.tensor if parallel.sequence else positions
    linears = linear_shapes(config.model, parallel.tensor)
    query, features = linears[PROJ.name][1], linears[QKV.name][0]
    key, heads = (features - query) // 2, shape.num_attention_heads // parallel.tensor
    rotation = 4 * positions * head_size(shape) * number  # cosines and sines, for queries and for keys
    kept = (2 * query + key + features) * positions * number + 4 * heads * positions
    residual = scattered * shape.hidden_size * number
    family = FAMILIES[config.model.family]
    if family.head_norms:
        kept += (query * number + 4 * (query + key) // head_size(shape)) * positions
    zero_centered = family.zero_centered_norms
    return _Sizes(
        whole=positions * shape.hidden_size * number,
        residual=residual,
        statistics=4 * scattered,
        norm_input=max(4, number) * scattered * shape.hidden_size if zero_centered else residual,  # widened first
        qkv=features * positions * number,
        attention=kept + rotation,
        feed_forward=linears[FC2.name][1] * positions * number,
    )


def saved_layer_bytes(config: Config, active: bool, recompute: str | None = None) -> int:
    """Bytes that one decoder layer keeps of a micro-batch for its backward pass.

    Args:
        recompute: None: as `parallel.recompute` says.
    """
    sizes, recompute = _sizes(config), recompute or config.parallel.recompute
    if recompute == "full":
        return sizes.residual
    post_norms = FAMILIES[config.model.family].post_norms
    norm = sizes.norm_input + sizes.statistics
    kept = norm + sizes.attention + (sizes.residual if active else 0) + (norm if post_norms else 0)
    if recompute == "selective":
        return kept + sizes.residual
    return kept + _saved_mlp_bytes(config, active)


def _saved_mlp_bytes(config: Config, active: bool) -> int:
    """Of the norm before the MLP, and the MLP."""
    sizes, norms = _sizes(config), 2 if FAMILIES[config.model.family].post_norms else 1
    kept = norms * (sizes.norm_input + sizes.statistics) + 2 * sizes.feed_forward
    return kept + (sizes.residual + sizes.feed_forward if active else 0)


def _backward_bytes(config: Config, active: bool) -> int:
    """Most that a layer's backward pass holds beyond what was kept, while it works back through its MLP."""
    sizes, number = _sizes(config), WEIGHT_BYTES[config.precision.compute]
    fc1, fc2 = (linear.numel(config.model.shape, config.parallel.tensor) for linear in (FC1, FC2))
    gradient = 2 * sizes.whole  # of the layer's output, and on its way around the MLP
    at_product = 3 * sizes.feed_forward  # gradients of fc2's input, of gate and of up
    if active:
        at_fc2 = sizes.feed_forward + fc2 * number  # its input's gradient and its weight's
        at_fc1 = fc1 * number - sizes.feed_forward  # what the MLP kept is gone, but for fc1's output's gradient
    elif config.precision.frozen_weights == "fp8" and config.precision.frozen_inputs == "compute":
        at_fc2 = sizes.feed_forward + fc2 * number  # the weight, widened
        at_fc1 = fc1 * number + sizes.feed_forward
    elif config.precision.frozen_weights == "fp8":
        at_fc2 = sizes.feed_forward + sizes.whole // number + fc2  # the gradient in FP8, the weight transposed
        at_fc1 = fc1 + 2 * sizes.feed_forward // number
    else:
        at_fc2 = at_fc1 = sizes.feed_forward
    recomputed = {
        "none": 0,
        "selective": _saved_mlp_bytes(config, active) - sizes.residual,
        "full": saved_layer_bytes(config, active, "none") - sizes.residual,
    }[config.parallel.recompute]
    return recomputed + gradient + max(at_product, at_fc2, at_fc1)


def pass_bytes(
    config: Config, data_parallel: int, stage: int, active: Collection[int], num_microbatches: int
) -> dict[str, int]:
    """Bytes by part (activations, loss buffers, communication buffers, allocator reserve) at a step's fullest moment.

    Args:
        active: the layers that train, of the model that runs.
        num_microbatches: of one flush.
    """
    sizes, last = _sizes(config), stage == config.parallel.pipeline - 1
    in_flight = min(config.parallel.pipeline - stage, num_microbatches)
    saved, backward = _saved_and_backward(config, stage, active)
    peaks = [(in_flight * saved + backward, 0)]
    if last:  # the final norm keeps its input; its output, and what is being sent down, are there too
        peaks.append((in_flight * saved + 3 * sizes.residual, loss_bytes(config)))
    if stage == 0 and "embedding" in config.lisa.always_active:
        table = EMBEDDING.numel(config.model.shape, config.parallel.tensor) * WEIGHT_BYTES[config.precision.compute]
        peaks.append(((in_flight - 1) * saved + table + sizes.whole, 0))
    activations, loss = max(peaks, key=sum)
    activations += _input_bytes(config, num_microbatches)
    return {
        "activations": activations,
        "loss buffers": loss,
        "communication buffers": _communication_bytes(config, stage, data_parallel),
        "allocator reserve": CUDA_CONTEXT + int(FRAGMENTATION * (activations + loss)),
    }


def _saved_and_backward(config: Config, stage: int, active: Collection[int]) -> tuple[int, int]:
    """What a micro-batch in flight holds on a stage, and the most that its backward pass holds beyond it: each layer,
    from the last down, gives back what it kept when it is done."""
    kept = {trains: saved_layer_bytes(config, trains) for trains in (False, True)}
    working = {trains: _backward_bytes(config, trains) for trains in (False, True)}
    lowest, saved, most = lowest_reached(config, active), 0, 0
    for layer in reversed(stage_layers(config, stage)):
        if layer >= lowest:
            most = max(most, working[layer in active] - saved)
            saved += kept[layer in active]
    return saved, most


def _input_bytes(config: Config, num_microbatches: int) -> int:
    """Token numbers, targets and coefficients of all micro-batches, and the rotation's angles of one, in fp64."""
    positions = config.data.micro_batch_size * config.data.max_length
    return num_microbatches * positions * 52 + 8 * positions * head_size(config.model.shape)


def loss_bytes(config: Config) -> int:
    """Bytes of the head and its loss on the last stage, every position carrying loss."""
    number, positions = WEIGHT_BYTES[config.precision.compute], config.data.micro_batch_size * config.data.max_length
    wide = max(4, number)
    hidden = positions * config.model.shape.hidden_size
    rows = HEAD.shape(config.model.shape, config.parallel.tensor)[0]
    weight_gradient = rows * config.model.shape.hidden_size * wide if "head" in config.lisa.always_active else 0
    logits = min(positions, LOGITS_CHUNK) * rows * (wide if wide == number else wide + number)
    # Backwards the hidden states' gradient is scaled in fp32: two copies of it, and the result.
    return weight_gradient + 2 * hidden * number + max(logits, hidden * (2 * wide + number))


def _communication_bytes(config: Config, stage: int, data_parallel: int) -> int:
    """Buffers of what is sent and received, and NCCL's own: one communicator for all ranks, one per group."""
    parallel, sizes = config.parallel, _sizes(config)
    size = 0
    if parallel.pipeline > 1:
        size += 2 * sizes.residual
    if parallel.sequence:
        size += sizes.whole
    tied = config.model.shape.tied_embeddings and stage in (0, parallel.pipeline - 1)
    groups = [parallel.tensor, parallel.pipeline, data_parallel, parallel.pipeline if tied else 1]
    groups.append(parallel.tensor * parallel.pipeline * data_parallel)
    return size + NCCL_COMMUNICATOR * sum(group > 1 for group in groups)
