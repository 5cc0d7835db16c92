import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: its kernels then run on the CPU
os.environ["HF_HUB_OFFLINE"] = "1"  # tests need no network, and prove it

os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "home")  # not the user's

from selfnpo.models import PretrainedModel, load_pretrained


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and there is none"))


@pytest.fixture(autouse=True)
def _one_thread():
    """The same reductions, hence the same bits, whatever the machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo() -> PretrainedModel:
    return load_pretrained()
