from dataclasses import dataclass

import pytest
import torch

import selfnpo_kernels


@dataclass(frozen=True)
class Place:
    """A compiled backend and the device on which it runs here; without a GPU Triton's interpreter (tests/conftest.py)."""

    backend: str
    device: str

    @property
    def rounds_down(self) -> bool:
        """Triton's interpreter cuts bfloat16 off where GPUs round to nearest."""
        return self.backend == "triton" and self.device == "cpu"


@pytest.fixture(params=["cpp", "triton"])
def place(request):
    device = "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"
    with selfnpo_kernels.backend(request.param):
        yield Place(request.param, device)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch):
    """Memory that an op allocates holds NaN, so an element that a kernel forgets is seen."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))
        return tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))
