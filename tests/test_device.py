"""The seam between machines with and without CUDA. An upgrade of Megatron-Core that moves a location fails here."""

import importlib
import inspect

import pytest
import torch

from megatron_scalebio import device
from megatron_scalebio.config import UserError


@pytest.mark.parametrize("location", device.SEAM, ids=lambda location: location.module.rpartition(".")[2])
def test_megatron_core_depends_on_cuda_where_the_seam_says(location):
    assert location.source in inspect.getsource(importlib.import_module(location.module)), location.why


def test_the_seam_refuses_to_install_itself_where_cuda_is_in_use(monkeypatch):
    before = torch.cuda.current_device, torch.cuda.synchronize, torch.Tensor.cuda
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA is in use"):
        device.install_cpu_seam()
    assert (torch.cuda.current_device, torch.cuda.synchronize, torch.Tensor.cuda) == before


def test_cuda_asked_for_by_name_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="run.device=cuda"):
        device.choose_device("cuda")
    assert device.choose_device("auto") == device.choose_device("cpu") == device.CPU


def test_numbers_read_back_keep_their_bits():
    assert device.read_back(torch.tensor([[0.1], [1e-300]], dtype=torch.float64)) == [0.1, 1e-300]
