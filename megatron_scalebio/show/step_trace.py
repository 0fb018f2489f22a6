"""`run.profile`: a trace of some steps, which ui.perfetto.dev and chrome://tracing open."""

from pathlib import Path

import torch
from torch.profiler import profile

from megatron_scalebio.config import RunConfig
from megatron_scalebio.run_folder import RunFolder
from megatron_scalebio.spans import profiler


class StepTrace:
    """Writes output_dir/profile/rank_N.json.gz, of this rank's steps from the first to the last that `run.profile`
    names: torch's operations, the spans that they lie in, and on a GPU its kernels. Used as a context manager around
    the run, so that a run that ends between those steps leaves a trace of what there was.

    Recording takes time, most of all in the first of the steps. What a step leaves is held until the last has ended.
    """

    def __init__(self, run: RunConfig, rank: int, device: torch.device):
        self.steps = () if run.profile is None else range(run.profile["steps"][0], run.profile["steps"][1] + 1)
        self.path, self.device = RunFolder(Path(run.output_dir)).profile / f"rank_{rank}.json.gz", device
        self._running: profile | None = None

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, *exception: object) -> None:
        self._write()

    def begin(self, step: int) -> None:
        """Before a step, counted from 1."""
        if step in self.steps and self._running is None:
            self._running = profiler(self.device)
            self._running.start()

    def end(self, step: int) -> None:
        """After it, and what follows it but the checkpoint."""
        if step + 1 not in self.steps:
            self._write()

    def _write(self) -> None:
        if self._running is None:
            return
        self._running.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._running.export_chrome_trace(str(self.path))
        self._running = None
