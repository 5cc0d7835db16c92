import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: its kernels then run on the CPU

from selfnpo.models import PretrainedModel, load_pretrained


@pytest.fixture(autouse=True)
def _two_threads():
    """The same reductions, hence the same bits, whatever the machine."""
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def demo() -> PretrainedModel:
    return load_pretrained("demo")
