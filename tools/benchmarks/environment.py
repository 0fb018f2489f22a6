"""What a measured number needs beside it to mean something, and the file that holds both."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# What computes, then whom the kernels are held against.
PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "flash-attn", "apex")
PACKAGES += ("liger-kernel", "cut-cross-entropy", "quack-kernels")


def environment(
    device: torch.device, settings: Sequence[str] = (), world_size: int = 1, command: str | None = None
) -> dict[str, Any]:
    """The record that every result file holds under "environment".

    Args:
        settings: what was given on the command line on top of the tool's own, as section.key=value.
        world_size: ranks that measured together.
        command: as it was typed; None: this process's own.
    """
    cuda = torch.cuda.nccl.version() if device.type == "cuda" else None
    versions = {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}
    return {
        "device": name_of(device),
        "world_size": world_size,
        "commit": _commit(),
        "command": command or " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": list(settings),
        "date": datetime.now().isoformat(timespec="seconds"),
        "versions": versions | ({"cuda": torch.version.cuda, "nccl": ".".join(map(str, cuda))} if cuda else {}),
    }


def name_of(device: torch.device) -> str:
    """As torch names a GPU; a CPU by its architecture, cores and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads per rank"


def write_results(file: Path | None, content: dict[str, Any]) -> None:
    """Write a result file, whole or not at all; None: nowhere."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """HEAD, and whether anything differs from it; results apart, which a run itself writes."""
    commands = (
        ["git", "rev-parse", "HEAD"],
        ["git", "status", "--porcelain", "--", ":/", ":(top,exclude)tools/benchmarks/results"],
    )
    try:
        head, changes = (
            subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown: no git repository here"
    return head.strip() + (" and uncommitted changes" if changes else "")
