"""One directory per checkpoint, `checkpoints/step_N`: written aside, committed by a rename, so that a directory of
that name is complete.

`state.json` holds the small state in plain numbers, and what the checkpoint belongs to; the tensors are in
Megatron-Core's distributed format. Resuming on the same layout continues bit for bit.
"""

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_scalebio.config import Config, UserError, config_sha256
from megatron_scalebio.run_folder import RunFolder

# Of what a checkpoint holds: another number where an older one lacks what a run now needs to go on.
FORMAT = 2

# It warns at every save, on every rank, that its built-in writer is deprecated.
logging.getLogger("megatron.core.dist_checkpointing.strategies.torch").setLevel(logging.ERROR)


class Checkpointable(Protocol):
    """What a checkpoint needs of the models; see `mcore.persistence.Persistence`."""

    def state(self) -> dict[str, Any]: ...  # every rank calls it

    def sharded_tensors(self) -> dict[str, ShardedTensor]: ...

    def prepare_to_load(self, state: dict[str, Any]) -> None: ...

    def load_tensors(self, loaded: dict[str, Tensor]) -> None: ...


def newest_checkpoint(config: Config) -> Path | None:
    """The complete checkpoint of the highest step, or None."""
    folder = RunFolder(Path(config.run.output_dir))
    step = folder.newest_step()
    return None if step is None else folder.checkpoint(step)


def save_checkpoint(
    config: Config, step: int, dataset_fingerprint: str, run_state: dict[str, Any], models: Checkpointable
) -> None:
    """Write the state after `step`; every rank takes part. A checkpoint of that step that exists is left as it is.

    `run_state` is what else the run needs to go on, as JSON keeps it: it comes back under its keys in `read_state`.
    """
    final = RunFolder(Path(config.run.output_dir)).checkpoint(step)
    if final.exists():
        return
    partial = final.with_name(final.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # what an interrupted save of ours left behind
        partial.mkdir(parents=True)
    dist.barrier()
    with _spawning_without_main():
        dist_checkpointing.save(models.sharded_tensors(), str(partial), verify_integrity=True)
    models_state = models.state()
    if dist.get_rank() == 0:
        content = {
            **run_state,
            "format": FORMAT,
            "step": step,
            "config_sha256": config_sha256(config),
            "dataset_fingerprint": dataset_fingerprint,
            "layout": _layout(config),
            "models": models_state,
        }
        (partial / "state.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.rename(partial, final)
    dist.barrier()


@contextmanager
def _spawning_without_main() -> Iterator[None]:
    """Megatron-Core's writer spawns a process, which would import the user's own script again, and so run it, wherever
    it does not ask for its name; the process needs nothing of it."""
    main = vars(sys.modules["__main__"])
    kept = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(kept)


def read_state(path: Path, config: Config, dataset_fingerprint: str | None) -> dict[str, Any]:
    """A checkpoint's small state, checked to belong to this run; without a fingerprint to any data.

    Raises: UserError, naming what differs.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: state.json cannot be read ({error}); move it away to resume before it") from error
    if state.get("format") != FORMAT:
        raise UserError(
            f"{path} cannot be continued: it was written by another version (format {state.get('format')} there,"
            f" {FORMAT} here); finish the run with that version, or start anew in another run.output_dir"
        )
    expected = {
        "config_sha256": (config_sha256(config), "the settings"),
        "dataset_fingerprint": (dataset_fingerprint, "the examples in the data files"),
        "layout": (_layout(config), "the layout: resuming on another one is not supported"),
    }
    for key, (value, words) in expected.items():
        if value is not None and state.get(key) != value:
            raise UserError(
                f"{path} cannot be continued: it was written with other values of {words} ({state.get(key)} there, "
                f"{value} here); restore them, or start anew in another run.output_dir"
            )
    return state


def load_models(path: Path, state: dict[str, Any], models: Checkpointable) -> None:
    """Load both models' tensors. The layers that were active at the save must be active.

    Raises: UserError if the files are damaged.
    """
    models.prepare_to_load(state["models"])
    try:
        loaded = dist_checkpointing.load(models.sharded_tensors(), str(path), verify_integrity=True)
    except dist_checkpointing.core.CheckpointingException as error:
        raise UserError(f"{path} is damaged: {error}; move the folder away to resume before it") from error
    models.load_tensors(loaded)


def _layout(config: Config) -> dict[str, int]:
    model_parallel = config.parallel.tensor * config.parallel.pipeline
    return {
        "tensor": config.parallel.tensor,
        "pipeline": config.parallel.pipeline,
        "data": dist.get_world_size() // model_parallel,
    }
