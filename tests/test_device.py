"""The seam between machines with and without CUDA. An upgrade of Megatron-Core that moves a location fails here."""

import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch

from megatron_scalebio import device
from megatron_scalebio.config import UserError


@pytest.mark.parametrize("location", device.SEAM, ids=lambda location: location.module.rpartition(".")[2])
def test_megatron_core_depends_on_cuda_where_the_seam_says(location):
    assert location.source in inspect.getsource(importlib.import_module(location.module)), location.why


def test_a_rehearsal_runs_where_cuda_has_been_started_and_leaves_it_as_it_was(monkeypatch):
    """Importing Transformer Engine starts it."""
    before = torch.cuda.current_device, torch.cuda.synchronize
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with device.rehearsal():
        assert torch.cuda.current_device() == device.CPU
    assert (torch.cuda.current_device, torch.cuda.synchronize) == before


@pytest.mark.parametrize("ranks_here, smallest", [(1, 80), (2, 40), (3, 16), (8, 16)])
def test_only_the_gpus_that_ranks_drive_count(monkeypatch, ranks_here, smallest):
    """The third is a display's; a dry run may plan for more ranks than there are GPUs."""
    memory = [80, 40, 16]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(memory))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=memory[index]))
    assert device.gpu_memory(ranks_here) == smallest


def test_cuda_asked_for_by_name_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="run.device=cuda"):
        device.choose_device("cuda")
    assert device.choose_device("auto") == device.choose_device("cpu") == device.CPU


def test_numbers_read_back_keep_their_bits():
    assert device.read_back(torch.tensor([[0.1], [1e-300]], dtype=torch.float64)) == [0.1, 1e-300]
