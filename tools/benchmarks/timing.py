"""Times of device work, and the ceilings they are held against, measured on the same device in the same run."""

import functools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

WARM_UPS = 3
FEWEST_RUNS, MOST_RUNS = 5, 100
FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any GPU so far (Hopper: 50 MB)
COPY_BYTES = {"cuda": 2 * 2**30, "cpu": 64 * 2**20}  # of the buffer that is copied
GEMM_SIZE = {"cuda": 8192, "cpu": 512}
PEERS = ("liger-kernel", "cut-cross-entropy", "quack-kernels", "transformer-engine")


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
    runs = min(max(int(1e3 * seconds / estimate), FEWEST_RUNS), MOST_RUNS)
    times = milliseconds(call, runs)
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Times(statistics.median(times), deciles[0], deciles[-1], runs)


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


def environment(device: torch.device, command: str) -> dict[str, str | None]:
    """What a number needs beside it to mean something."""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        name = f"CPU {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    versions = {package: _installed_version(package) for package in ("torch", "triton", *PEERS)}
    return {"command": command, "commit": _commit(), "device": name, **versions}


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """HEAD, and whether the kernels or their benchmark differ from it."""
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--", "kernels", "tools/*.py"])
    try:
        head, changes = (
            subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown: no git repository here"
    return head.strip() + (" and uncommitted changes" if changes else "")
