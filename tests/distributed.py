"""Real gloo process groups for tests: one start per world size and pytest session, shared by all tests.

`run_distributed(world_size, function, *args)` runs a module-level function on every rank of a pool of worker
processes and returns what each rank returned. The processes stay for the next call; their process groups do not:
every call finds a fresh default group and no Megatron layout, so tests with different layouts share one world, and
the sockets and threads of old groups are gone. After any failure the whole pool is replaced, because a rank that
stopped half-way leaves the others inside a collective.
"""

import atexit
import contextlib
import datetime
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

TIMEOUT = 120.0  # seconds for one call
GRACE = 3.0  # seconds in which the other ranks may still answer once one has failed


class RankError(AssertionError):
    """A function failed, died or hung on a rank; the message carries that rank's traceback."""


@dataclass(frozen=True)
class _Failure:
    time: float  # of the monotonic clock, which all processes of a machine share
    text: str


def run_distributed(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT, interpret: bool = False
) -> list[Any]:
    """Run `function(*args)` on ranks 0 to world_size - 1 and return their results in rank order.

    The function is pickled by reference, so it must be importable by its module's name; arguments and results are
    pickled by value, tensors included. Inside, torch.distributed is initialised with gloo and one thread per rank.
    Only a function that catches an expected exception itself keeps the pool for the next test.
    With `interpret` the ranks run Triton kernels, on the CPU, where the product takes the plain references.

    Raises:
        RankError: a rank raised (first traceback in time), died (exit status), or did not answer within `timeout`
            seconds (where each missing rank was).
    """
    pool = _pools.get((world_size, interpret))
    if pool is None:
        pool = _pools[world_size, interpret] = _Pool(world_size, interpret)
    try:
        return pool.call(function, args, timeout)
    except BaseException:  # an interrupt too leaves ranks behind in the call
        del _pools[world_size, interpret]
        pool.kill()
        raise


_pools: dict[tuple[int, bool], "_Pool"] = {}


@atexit.register
def _close_pools() -> None:
    for pool in _pools.values():
        pool.close()


class _Pool:
    """The worker processes of one world size. They end when their connection closes, so never outlive the session."""

    def __init__(self, world_size: int, interpret: bool):
        self.world_size = world_size
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # port 0: a free one
        self.stacks = tempfile.TemporaryDirectory(prefix="rank_stacks_")
        self.calls = 0
        self.connections: list[Connection] = []
        self.processes = []
        context = multiprocessing.get_context("spawn")
        interpreting = {"TRITON_INTERPRET": "1"} if interpret else {}
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", **interpreting):
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                # Not daemonic: checkpoint writers are children of the ranks.
                process = context.Process(
                    target=_worker, args=(rank, world_size, interpret, self.store.port, theirs, self._stack_file(rank))
                )
                process.start()
                theirs.close()
                self.connections.append(ours)
                self.processes.append(process)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        """Send one call to every rank and collect the answers; after the first failure wait GRACE for the rest."""
        self.calls += 1
        request = pickle.dumps((function, args))  # tensors by value, where Connection.send would share their memory
        for connection in self.connections:
            with contextlib.suppress(BrokenPipeError):  # a worker that died between calls is reported below
                connection.send_bytes(pickle.dumps((self.calls, sys.path, timeout, request)))
        replies: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(replies) < self.world_size:
            waiting = {c: r for r, c in enumerate(self.connections) if r not in replies}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                replies[waiting[connection]] = reply = self._receive(waiting[connection])
                if isinstance(reply, _Failure):
                    deadline = min(deadline, time.monotonic() + GRACE)
        failures = {rank: reply for rank, reply in replies.items() if isinstance(reply, _Failure)}
        if not failures and len(replies) == self.world_size:
            return [replies[rank] for rank in range(self.world_size)]
        name = f"{function.__module__}.{function.__qualname__}"
        raise RankError(self._describe(name, failures, sorted(set(range(self.world_size)) - set(replies)), timeout))

    def _receive(self, rank: int) -> Any:
        try:
            return pickle.loads(self.connections[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self.processes[rank].join()
            status = self.processes[rank].exitcode
            # Time 0: a death comes first, whatever its peers say of closed connections before it is noticed.
            return _Failure(0.0, f"the process ended with status {status}\n{self._read_stack(rank)}")

    def _describe(self, name: str, failures: dict[int, _Failure], missing: list[int], timeout: float) -> str:
        if failures:
            first = min(failures, key=lambda rank: failures[rank].time)
            others = [rank for rank in sorted(failures) if rank != first]
            lines = [f"{name} failed on rank {first} of {self.world_size}:", failures[first].text.rstrip()]
            lines += [f"rank {rank}, later: {failures[rank].text.rstrip().splitlines()[-1]}" for rank in others]
            if missing:
                lines.append(f"ranks {missing} had not answered {GRACE:g} s later")
            return "\n".join(lines)
        for rank in missing:
            os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(1.0)  # for the workers to write their stacks
        stacks = "".join(f"\nrank {rank} of {self.world_size} was here:\n{self._read_stack(rank)}" for rank in missing)
        return f"{name}: no answer within {timeout:g} s from ranks {missing}{stacks}"

    def _stack_file(self, rank: int) -> Path:
        return Path(self.stacks.name) / f"rank_{rank}"

    def _read_stack(self, rank: int) -> str:
        path = self._stack_file(rank)
        return path.read_text() if path.exists() else ""

    def kill(self) -> None:
        """End the workers and what they started, whatever they are doing."""
        for process in self.processes:
            process.kill()
            with contextlib.suppress(ProcessLookupError):  # gone, or killed before it led a group
                os.killpg(process.pid, signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """Let idle workers end; kill those that do not."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()
        self.stacks.cleanup()


def _worker(rank: int, world_size: int, interpret: bool, port: int, connection: Connection, stack_file: Path) -> None:
    """Serve calls until the connection closes."""
    if interpret:
        from tests.interpreter import install

        install()
    torch.set_num_threads(1)
    os.setsid()  # Ctrl-C is the session's to handle; and what the tests start here dies with this process group
    warnings.filterwarnings("ignore", module=r"megatron\.core")  # what is not installed, once per rank and import
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    with stack_file.open("w") as stacks:
        faulthandler.enable(stacks)
        faulthandler.register(signal.SIGUSR1, stacks)
        while True:
            try:
                call, path, timeout, request = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            sys.path[:] = path  # pytest extends it as it collects
            try:
                group_store = dist.PrefixStore(f"call_{call}", store)
                limit = datetime.timedelta(seconds=timeout)
                dist.init_process_group("gloo", store=group_store, rank=rank, world_size=world_size, timeout=limit)
                function, args = pickle.loads(request)
                reply = pickle.dumps(function(*args))
                dist.barrier()  # no rank closes its sockets while another still reads from them
                _destroy_groups()
            except BaseException:  # SystemExit too: what a rank does ends its call, never its process
                reply = pickle.dumps(_Failure(time.monotonic(), traceback.format_exc()))
            connection.send_bytes(reply)


def _destroy_groups() -> None:
    """Forget Megatron's layout, if there is one, and close every process group."""
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
