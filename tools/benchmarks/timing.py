"""Times of a device's work and of whole steps, and the ceilings they are held against, measured in the same run."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

WARM_UPS = 3
FEWEST_RUNS, MOST_RUNS = 5, 100
FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any GPU so far (Hopper: 50 MB)
COPY_BYTES = {"cuda": 2 * 2**30, "cpu": 64 * 2**20}  # of the buffer that is copied
GEMM_SIZE = {"cuda": 8192, "cpu": 512}


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call, over `runs` calls."""

    median: float
    p10: float
    p90: float
    runs: int


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best: a copy's bytes, read plus written, and a square bf16 matrix product's FLOPs."""

    bytes_per_second: float
    flops_per_second: float


def measure(call: Callable[[], object], device: torch.device, seconds: float) -> Times:
    """Time `call`, warm, in about `seconds`.

    On CUDA each run is timed by events and starts from a cold L2 cache, as in training, where other work lies between
    two calls; what the host takes to launch counts only where the device has to wait for it.
    """
    milliseconds = _cuda_milliseconds if device.type == "cuda" else _host_milliseconds
    estimate = milliseconds(call, WARM_UPS)[-1]
    times = milliseconds(call, min(max(int(1e3 * seconds / estimate), FEWEST_RUNS), MOST_RUNS))
    return Times(statistics.median(times), *outer_deciles(times), len(times))


def outer_deciles(values: Sequence[float]) -> tuple[float, float]:
    """The 10th and the 90th percentile; of a single value, that value."""
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values
    return deciles[0], deciles[-1]


def _cuda_milliseconds(call: Callable[[], object], runs: int) -> list[float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in events:
        flush.zero_()  # also keeps the device busy while the host launches what follows
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _host_milliseconds(call: Callable[[], object], runs: int) -> list[float]:
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return times


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Wall time of an action that all ranks take together, on the slowest one, the device's work included."""
    dist.barrier()
    torch.cuda.synchronize()  # does nothing on the CPU, where Megatron-Core's seam stands in for it
    started = time.perf_counter()
    action()
    torch.cuda.synchronize()
    elapsed = torch.tensor(time.perf_counter() - started, device=device)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return elapsed.item()


def measure_in_turn(
    first: Callable[[], object], second: Callable[[], object], device: torch.device, pairs: int
) -> dict[str, float]:
    """Median seconds of both, and median, least and greatest ratio first / second, pair by pair, after a warm-up."""
    first(), second()
    times = [(seconds_of(first, device), seconds_of(second, device)) for _ in range(pairs)]
    ratios = [a / b for a, b in times]
    return {
        "first_seconds": statistics.median(a for a, _ in times),
        "second_seconds": statistics.median(b for _, b in times),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "pairs": pairs,
    }


def measure_ceilings(device: torch.device, seconds: float) -> Ceilings:
    """On random numbers: zeros can make a GPU faster than it is."""
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copy = measure(functools.partial(target.copy_, source), device, seconds)
    size = GEMM_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    gemm = measure(functools.partial(torch.mm, a, b, out=torch.empty_like(a)), device, seconds)
    return Ceilings(2e3 * COPY_BYTES[device.type] / copy.median, 2e3 * size**3 / gemm.median)


def release_memory(device: torch.device) -> None:
    """Give cached memory back, so that the next contender finds the device as the first one did."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
