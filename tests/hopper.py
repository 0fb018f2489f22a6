"""Kernels compiled ahead of time for sm_90, as the product launches them: no GPU is needed to see what a GPU would run.

Inside `compiled_for_hopper()` a launch compiles its kernel, with the types, alignments and constants of the arguments
at hand, and does not run it.
"""

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"


@dataclass(frozen=True)
class Kernel:
    """What the assembler made of one kernel. `instructions` counts SASS opcodes with their modifiers."""

    name: str
    registers: int  # per thread
    shared_bytes: int  # per program
    num_warps: int
    stack_bytes: int
    instructions: dict[str, int]

    def count(self, prefix: str) -> int:
        return sum(number for opcode, number in self.instructions.items() if opcode.startswith(prefix))

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return self.count("LDL") + self.count("STL")


@contextlib.contextmanager
def compiled_for_hopper() -> Iterator[list[Kernel]]:
    """Within it, launches compile for sm_90; yields the list that the kernels are added to, in order of launch."""
    kernels: list[Kernel] = []
    compile_and_run = JITFunction.run

    def compile_only(function, *args, grid, warmup, **kwargs):
        compiled = compile_and_run(function, *args, grid=grid, warmup=True, **kwargs)
        kernels.append(_inspect(compiled))
        return compiled

    before = driver._active
    driver.set_active(_NoDevice())
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield kernels
    finally:
        driver._active = before


class _NoDevice:
    """As much of a driver as compilation asks for. The device number keeps its kernels apart from a real device's."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0


@functools.cache  # launches that differ in nothing that compilation looks at share one kernel
def _inspect(compiled) -> Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(TOOLS / "cuobjdump", "-res-usage", file.name)
        assembly = _output(TOOLS / "nvdisasm", "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    instructions: dict[str, int] = {}
    for opcode in re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", assembly, re.MULTILINE):
        instructions[opcode] = instructions.get(opcode, 0) + 1
    metadata = compiled.metadata
    return Kernel(metadata.name, registers, metadata.shared, metadata.num_warps, stack, instructions)


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
