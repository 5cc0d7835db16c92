"""Short runs on a GPU."""

from collections.abc import Callable

import pytest
import torch

import runs
import tiny
from selfnpo.models import DEMO
from selfnpo.training.trainer import Trainer

Losses = list[float]


@pytest.fixture(autouse=True)
def _same_algorithms(monkeypatch):
    """cuDNN chooses alike in every run."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {"demo": DEMO, "stable_diffusion": tiny.save("stable_diffusion", tmp_path_factory.mktemp("tiny"))}


@pytest.fixture
def begin(folders) -> Callable[..., Trainer]:
    """A run of a model, before its first step; the learning rate falls all the time."""

    def begun(model: str, **changes: object) -> Trainer:
        return runs.start(runs.settings(folders[model], **({"max_train_steps": 400, "attention": "sdpa"} | changes)))

    return begun


@pytest.fixture
def trained(begin) -> Callable[..., tuple[Trainer, Losses]]:
    """A run after some steps, which were replayed if it is captured, and its losses."""

    def run(steps: int, model: str, **changes: object) -> tuple[Trainer, Losses]:
        trainer = begin(model, **changes)
        losses = torch.stack([trainer.train_step()[0] for _ in range(steps)]).tolist()
        assert is_replayed(trainer) == (changes["capture"] == "on")
        return trainer, losses

    return run


def is_replayed(trainer: Trainer) -> bool:
    """Whether steps are replayed from a graph: neither ordinary ones, nor ordinary ones where capturing failed."""
    execute = trainer.step._execute
    return bool(getattr(execute, "replay", None)) and execute.replay != execute.step
