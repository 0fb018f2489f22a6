"""Process groups of one layout: the world is a grid of tensor x data x pipeline parallel ranks, tensor innermost."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from torch.distributed import ProcessGroup

from megatron_scalebio.config import ParallelConfig
from megatron_scalebio.device import backend, install_cpu_seam


@dataclass(frozen=True)
class ProcessGroups:
    """This rank's place in the grid, and the groups that are the grid's slices through it."""

    rank: int
    world_size: int
    tensor: ProcessGroup
    pipeline: ProcessGroup
    data: ProcessGroup
    embedding: ProcessGroup | None  # first and last stage; None on the stages between
    collection: ProcessGroupCollection  # the same, as Megatron-Core's modules take them

    @property
    def tensor_rank(self) -> int:
        return self.tensor.rank()

    @property
    def stage(self) -> int:
        return self.pipeline.rank()

    @property
    def num_stages(self) -> int:
        return self.pipeline.size()

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.num_stages - 1


def start_process_groups(parallel: ParallelConfig, device: torch.device) -> ProcessGroups:
    """Start torch.distributed if need be (torchrun's environment, else one process) and cut the grid.

    May be called again with another layout: the old groups are dropped.
    """
    if device.type == "cpu":
        install_cpu_seam()
    if not dist.is_initialized():
        _start_distributed(device)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        create_gloo_process_groups=False,
    )
    # Nothing is random in a step (no dropout, own initial weights), so Megatron-Core's tracker of random states
    # becomes the one that does nothing: its fork() is a null context.
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    return ProcessGroups(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor=collection.tp,
        pipeline=collection.pp,
        data=collection.dp,
        embedding=collection.embd,
        collection=collection,
    )


def _start_distributed(device: torch.device) -> None:
    if "RANK" in os.environ:
        dist.init_process_group(backend(device))
        return
    dist.init_process_group(backend(device), store=dist.HashStore(), rank=0, world_size=1)
