"""What a step takes by arithmetic: seconds, bubble and bytes sent, from stated ceilings. A prediction, never measured.

A matrix product takes the longer of its FLOPs over the peak and its bytes over the memory's bandwidth, each at an
assumed efficiency (`EFFICIENCY`); what stands between the products is bound by bytes; collectives wait and overlap with
nothing. Each stage gets a time forward and backward for one micro-batch, from the mean number of active layers that the
draws put there; `flush_seconds` then runs the schedule.

T positions of a micro-batch, H hidden, F feed-forward size, V padded vocabulary of a rank.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_scalebio.anatomy import FAMILIES
from megatron_scalebio.anatomy.decoder import EMBEDDING, FC2, HEAD, QKV
from megatron_scalebio.anatomy.storage import padded_block
from megatron_scalebio.config import Config
from megatron_scalebio.plan.flops import Work, attention_flops, recomputed_linears
from megatron_scalebio.plan.sizes import (
    GIB,
    MASTER_BYTES,
    WEIGHT_BYTES,
    layer_parameters,
    linear_shapes,
    lowest_reached,
    moment_bytes,
    stage_blocks,
    stage_layers,
)


@dataclass(frozen=True)
class Device:
    name: str
    memory: int  # bytes that torch sees
    flops: dict[str, float]  # dense, per second, by the operands' type
    bandwidth: float  # bytes per second of its memory


# NVIDIA's data sheets of H100 and H200 (SXM); they print FLOPs with sparsity, twice the dense ones below.
H100 = Device("H100 SXM", int(79.1 * GIB), {"bf16": 989e12, "fp8": 1979e12}, 3.35e12)
H200 = Device("H200 SXM", int(139.8 * GIB), {"bf16": 989e12, "fp8": 1979e12}, 4.8e12)
NVLINK = 450e9  # bytes per second each way and GPU (same data sheets: 900 GB/s both ways)
NETWORK = 50e9  # the same between nodes: one 400 Gb/s port for each GPU, as in a DGX H100
HOST_LINK = 64e9  # PCIe 5.0 x16, each way, nominal
GPUS_PER_NODE = 8

# Assumed shares of the ceilings that are reached; not measured.
EFFICIENCY = {"bf16": 0.7, "fp8": 0.4, "attention": 0.5, "memory": 0.85, "links": 0.75}


def device_of(memory: int) -> Device:
    """The device whose ceilings count for a GPU of so many bytes."""
    return H100 if memory < 100 * GIB else H200


@dataclass(frozen=True)
class StageLoad:
    """What a stage computes of a micro-batch, on average over the draws and models."""

    num_layers: int
    reached: float  # layers that a gradient passes through
    active: float  # layers that train


@dataclass(frozen=True)
class StepTime:
    seconds: float
    parts: dict[str, float]  # seconds by part of the slowest stage
    bubble: float  # share of the GPUs' time in the passes that stages wait for each other
    bubble_fused: float  # the same with one flush for all passes
    bubble_separate: float  # the same with a flush for each pass
    sent: dict[str, float]  # bytes that the busiest rank sends in a step, by kind of group


def stage_loads(config: Config, draws: Sequence[Sequence[Collection[int]]]) -> list[StageLoad]:
    """Of each stage, over the draws of all periods and models."""
    actives = [set(layers) for draw in draws for layers in draw]
    loads = []
    for stage in range(config.parallel.pipeline):
        layers = stage_layers(config, stage)
        reached = [len(layers) - min(max(lowest_reached(config, a) - layers.start, 0), len(layers)) for a in actives]
        trains = [sum(layer in active for layer in layers) for active in actives]
        loads.append(StageLoad(len(layers), sum(reached) / len(actives), sum(trains) / len(actives)))
    return loads


def flush_seconds(forward: Sequence[float], backward: Sequence[float], delay: float, num_microbatches: int) -> float:
    """One 1F1B flush: a stage first runs as many micro-batches forward as stages follow it, then one backward after
    each one forward, then what is left backward.

    Args:
        forward, backward: seconds of each stage for one micro-batch.
        delay: seconds between a stage's end and its neighbour's begin.
    """
    last = len(forward) - 1
    orders = [_schedule(last - stage, num_microbatches) for stage in range(last + 1)]
    clock, done = [0.0] * (last + 1), [0] * (last + 1)
    ended = [[0.0] * (2 * num_microbatches) for _ in range(last + 1)]  # of forward i at 2 i, of backward i at 2 i + 1
    running = True
    while running:
        running = False
        for stage, order in enumerate(orders):
            while done[stage] < len(order):
                operation = order[done[stage]]
                is_backward = operation % 2
                neighbour = stage + 1 if is_backward else stage - 1
                start = clock[stage]
                if 0 <= neighbour <= last:
                    if not ended[neighbour][operation]:
                        break
                    start = max(start, ended[neighbour][operation] + delay)
                clock[stage] = start + (backward if is_backward else forward)[stage]
                ended[stage][operation] = clock[stage]
                done[stage] += 1
                running = True
    return max(clock)


def _schedule(num_following: int, num_microbatches: int) -> list[int]:
    """A stage's operations in order: 2 i is micro-batch i forward, 2 i + 1 backward."""
    ahead = min(num_following, num_microbatches)
    order = [2 * index for index in range(ahead)]
    for index in range(num_microbatches - ahead):
        order += [2 * (ahead + index), 2 * index + 1]
    return order + [2 * index + 1 for index in range(num_microbatches - ahead, num_microbatches)]


def predict_step(
    config: Config,
    data_parallel: int,
    device: Device,
    loads: Sequence[StageLoad],
    work: Work,
    num_microbatches: Sequence[int],
) -> StepTime:
    """Seconds of one step.

    Args:
        work: of one micro-batch.
        num_microbatches: of each pass of the step.
    """
    clock = _Clock(config, data_parallel, device, work)
    stages = range(config.parallel.pipeline)
    forward, backward = stage_seconds(config, data_parallel, device, loads, work)
    hop = clock.residual / clock.pipeline_link / EFFICIENCY["links"]
    fused = flush_seconds(forward, backward, hop, sum(num_microbatches))
    apart = {number: flush_seconds(forward, backward, hop, number) for number in set(num_microbatches)}
    separate = sum(apart[number] for number in num_microbatches)
    busy = sum(num_microbatches) * (sum(forward) + sum(backward)) / len(stages)
    flush = fused if config.parallel.fused_pipeline else separate
    num_models = 1 if len(num_microbatches) == 1 else 2
    rest = [clock.update(stage, loads[stage], num_models) for stage in stages]
    slowest = max(rest, key=lambda parts: sum(parts.values()))
    parts = {"forward and backward": flush, **slowest}
    sent = [clock.sent(stage, loads[stage], num_models, sum(num_microbatches)) for stage in stages]
    return StepTime(
        seconds=sum(parts.values()),
        parts=parts,
        bubble=max(0.0, 1 - busy / flush),
        bubble_fused=max(0.0, 1 - busy / fused),
        bubble_separate=max(0.0, 1 - busy / separate),
        sent=max(sent, key=lambda kinds: sum(kinds.values())),
    )


def stage_seconds(
    config: Config, data_parallel: int, device: Device, loads: Sequence[StageLoad], work: Work
) -> tuple[list[float], list[float]]:
    """(forward, backward) seconds of every stage for one micro-batch."""
    clock = _Clock(config, data_parallel, device, work)
    pairs = [clock.micro_batch(stage, load) for stage, load in enumerate(loads)]
    return [forward for forward, _ in pairs], [backward for _, backward in pairs]


class _Clock:
    """Times and traffic of one layout's ranks."""

    def __init__(self, config: Config, data_parallel: int, device: Device, work: Work):
        self.config, self.device, self.work, self.data_parallel = config, device, work, data_parallel
        self.tensor = config.parallel.tensor
        self.number = WEIGHT_BYTES[config.precision.compute]
        self.fp8 = config.precision.frozen_weights == "fp8"
        self.whole = work.positions * config.model.shape.hidden_size * self.number
        self.residual = self.whole // self.tensor if config.parallel.sequence else self.whole
        ranks_per_stage = self.tensor * data_parallel
        self.pipeline_link = NVLINK if ranks_per_stage * config.parallel.pipeline <= GPUS_PER_NODE else NETWORK
        self.data_link = NVLINK if ranks_per_stage <= GPUS_PER_NODE else NETWORK
        self.linears = linear_shapes(config.model, self.tensor)
        self.layer_numel = layer_parameters(config.model, self.tensor)

    def micro_batch(self, stage: int, load: StageLoad) -> tuple[float, float]:
        """(forward, backward) seconds of a stage for one micro-batch."""
        frozen_forward, frozen_backward = self._layer(active=False)
        active_forward, active_backward = self._layer(active=True)
        forward = (load.num_layers - load.active) * frozen_forward + load.active * active_forward
        backward = (load.reached - load.active) * frozen_backward + load.active * active_backward
        if stage == 0:
            more = self._embedding()
            forward, backward = forward + more[0], backward + more[1]
        if stage == self.config.parallel.pipeline - 1:
            more = self._head()
            forward, backward = forward + more[0], backward + more[1]
        return forward, backward

    def update(self, stage: int, load: StageLoad, num_models: int) -> dict[str, float]:
        """Seconds of a step after the flush: gradients, optimizer, and a period's redraw as its share of one step."""
        config, master = self.config, MASTER_BYTES[self.config.precision.compute]
        numel = num_models * self._active_numel(stage, load)
        shard = numel / self.data_parallel
        # AdamW reads gradient, master and moments, and writes master, moments and weights; the norm reads the gradient
        # once more, and the next step begins by zeroing it.
        adamw = shard * (2 * master + 2 * master + self.number) + 2 * moment_bytes(config, int(shard)) + numel * master
        share = (self.data_parallel - 1) / self.data_parallel
        shared = share * numel * (master + self.number) / self.data_link / EFFICIENCY["links"]
        moved = 2 * num_models * load.active * self.layer_numel / self.data_parallel * master  # one down, one up
        period = config.lisa.period if config.lisa.enabled else config.bilevel.steps
        return {
            "optimizer": self._traffic(adamw),
            "data-parallel communication": shared,
            "redraw": moved / HOST_LINK / EFFICIENCY["links"] / period,
        }

    def sent(self, stage: int, load: StageLoad, num_models: int, num_microbatches: int) -> dict[str, float]:
        """Bytes that one rank sends in a step, by kind of group."""
        config, pipeline = self.config, self.config.parallel.pipeline
        numel = num_models * self._active_numel(stage, load)
        share = (self.data_parallel - 1) / self.data_parallel
        again = self._collectives_again()
        reduced = 2 * load.num_layers + (2 + again) * load.reached + (stage == 0) + (stage == pipeline - 1)
        neighbours = (stage > 0) + (stage < pipeline - 1)
        tied = config.model.shape.tied_embeddings and pipeline > 1 and stage in (0, pipeline - 1)
        table = EMBEDDING.numel(config.model.shape, self.tensor)
        return {
            "tensor": num_microbatches * reduced * self._all_reduced(self.whole),
            "pipeline": num_microbatches * neighbours * self.residual,
            "data": share * numel * (MASTER_BYTES[config.precision.compute] + self.number),
            "embedding": num_models * table * MASTER_BYTES[config.precision.compute] if tied else 0,
        }

    def _active_numel(self, stage: int, load: StageLoad) -> float:
        """Parameters of one model that train on a rank."""
        blocks = stage_blocks(self.config, stage)
        always = sum(padded_block(blocks.get(name, 0), self.data_parallel) for name in self.config.lisa.always_active)
        return always + load.active * self.layer_numel

    def _layer(self, active: bool) -> tuple[float, float]:
        """(forward, backward) seconds of one decoder layer that a gradient passes through."""
        config, recompute = self.config, self.config.parallel.recompute
        fp8 = self.fp8 and not active and config.precision.frozen_inputs == "fp8"
        products = {linear: self._product(*size, fp8) for linear, size in self.linears.items()}
        attention = (attention_flops(config, 0, self.work) + attention_flops(config, 1, self.work)) / 2
        attention /= self.device.flops["bf16"] * EFFICIENCY["attention"]
        collective = self._all_reduced(self.whole) / NVLINK / EFFICIENCY["links"]
        forward = sum(products.values()) + attention + self._between(forward=True, fp8=fp8) + 2 * collective
        backward = sum(products.values()) + 2.5 * attention + self._between(forward=False, fp8=fp8) + 2 * collective
        if active:  # the weight's gradient is written in the compute dtype, read again and added in fp32
            backward += sum(products.values()) + self._traffic((2 * self.number + 8) * self.layer_numel)
        matrices = sum(rows * columns for rows, columns in self.linears.values())
        if fp8:
            backward += self._traffic(2 * matrices)  # transposed
        elif self.fp8 and not active:
            forward += self._traffic((1 + self.number) * matrices)  # widened
            backward += self._traffic((1 + self.number) * matrices)
        again = sum(products[linear] for linear in recomputed_linears(config, active))
        if recompute == "selective":
            again += self._between(forward=True, fp8=fp8) / 2
        elif recompute == "full":
            again += attention + self._between(forward=True, fp8=fp8)
        return forward, backward + again + self._collectives_again() * collective

    def _collectives_again(self) -> int:
        """Collectives over tensor parallelism that a layer's recomputation repeats: its last one only for a norm that
        follows it."""
        recompute, post_norms = self.config.parallel.recompute, FAMILIES[self.config.model.family].post_norms
        return {"none": 0, "selective": post_norms, "full": 1 + post_norms}[recompute]

    def _product(self, rows: int, columns: int, fp8: bool) -> float:
        """Seconds of [T, columns] x [columns, rows]; its gradients' products are as large."""
        kind, size = ("fp8", 1) if fp8 else ("bf16", self.number)
        flops = 2 * self.work.positions * rows * columns / self.device.flops[kind] / EFFICIENCY[kind]
        return max(flops, self._traffic(size * (rows * columns + self.work.positions * (rows + columns))))

    def _between(self, forward: bool, fp8: bool) -> float:
        """Seconds of what stands between a layer's products: counted by the tensors that each operation, none of them
        fused, reads and writes."""
        positions, number = self.work.positions, self.number
        qkv, ffn = self.linears[QKV.name][0], self.linears[FC2.name][1]
        norms_and_sums = 10 if forward else 16  # times [T, H]: two norms, two additions
        rotation = 14  # times [T, qkv]: the bias, and two products, a negation and copies for queries and keys
        gate = 7 if forward else 13  # times [T, F]
        numbers = positions * (rotation * qkv + gate * ffn) + norms_and_sums * self.residual / number
        rounded = positions * sum(size[1] if forward else size[0] for size in self.linears.values()) if fp8 else 0
        return self._traffic(number * numbers + (number + 1) * rounded)

    def _embedding(self) -> tuple[float, float]:
        """(forward, backward) seconds; its gradient is a whole table, zeroed, written, read and added in fp32."""
        collective = self._all_reduced(self.whole) / NVLINK / EFFICIENCY["links"]
        table = EMBEDDING.numel(self.config.model.shape, self.tensor)
        trains = "embedding" in self.config.lisa.always_active
        backward = self._traffic((2 * self.number + 8) * table) if trains else 0.0
        return self._traffic(2 * self.whole) + collective, backward

    def _head(self) -> tuple[float, float]:
        """(forward, backward) seconds of the head and its loss: its gradients are made in the forward pass."""
        rows, hidden = HEAD.shape(self.config.model.shape, self.tensor)
        trains = "head" in self.config.lisa.always_active
        tokens = self.work.loss_tokens
        product = 2 * tokens * rows * hidden / self.device.flops["bf16"] / EFFICIENCY["bf16"]
        logits = self._traffic((3 * 4 + self.number) * tokens * rows)  # written, read by both passes; the gradient
        forward = (3 if trains else 2) * product + logits
        backward = self._traffic(12 * rows * hidden) if trains else 0.0  # the weight's gradient is added in fp32
        return forward, backward + self._all_reduced(self.whole) / NVLINK / EFFICIENCY["links"]

    def _all_reduced(self, size: float) -> float:
        """Bytes that a rank sends in a ring's all-reduce, or reduce-scatter and all-gather, over tensor parallelism."""
        return 2 * size * (self.tensor - 1) / self.tensor

    def _traffic(self, size: float) -> float:
        """Seconds to read or write so many bytes of the device's memory."""
        return size / self.device.bandwidth / EFFICIENCY["memory"]
