"""Short runs on tiny models, for the tests to start."""

from dataclasses import replace
from pathlib import Path

import pytest

from selfnpo.config import TrainConfig
from selfnpo.inputs.data import load_base, read_data
from selfnpo.models import Source
from selfnpo.training.trainer import Trainer

FAMILIES = [
    "stable_diffusion",
    "stable_diffusion_xl",
    "cogvideox",
    pytest.param("cogvideox_rotary", marks=pytest.mark.slow),
    "unconditional",
    "class_conditional",
]
RANKS = [0, 2]
SHORT = TrainConfig(  # on the demo
    max_train_steps=12, train_batch_size=16, learning_rate=1e-4, lr_warmup_steps=0, pool_size=2, checkpointing_steps=4,
    logging_steps=2,
)  # fmt: skip


def settings(folder: Path, **changes) -> TrainConfig:
    short = TrainConfig(
        pretrained_model_name_or_path=str(folder), max_train_steps=4, train_batch_size=2, pool_size=2, lr_warmup_steps=0,
        learning_rate=1e-3, checkpointing_steps=2, logging_steps=1, num_inference_steps=10, mixed_precision="no",
        tandem="sequential",
    )  # fmt: skip
    return replace(short, **changes)


def start(config: TrainConfig, output_dir: Path | None = None) -> Trainer:
    if output_dir is not None:
        output_dir.mkdir(exist_ok=True)
        config = replace(config, output_dir=output_dir)
    data = read_data(config, Source(config))
    return Trainer(config, load_base(config, data), output_dir, data=data)


def assert_same_state(one: Trainer, other: Trainer) -> None:
    """Bit for bit."""
    expected, got = one.state.tensors(), other.state.tensors()
    assert expected.keys() == got.keys()
    assert all(expected[name].equal(got[name]) for name in expected)
    for name in ("step", "reference_evaluations"):
        assert getattr(one.state, name) == getattr(other.state, name)
