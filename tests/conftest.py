import pytest
import torch

from selfnpo.models import PretrainedModel, load_pretrained


@pytest.fixture(autouse=True)
def _two_threads():
    """The same reductions, hence the same bits, whatever the machine."""
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def demo() -> PretrainedModel:
    return load_pretrained("demo")
