"""A training step on the embedded demo by rollout mode, at equal batch size: what truncation and the pool save.

pytest benchmarks --benchmark-only
"""

import pytest

from selfnpo.config import TrainConfig
from selfnpo.models import load_pretrained
from selfnpo.trainer import Trainer


@pytest.mark.parametrize("rollout", ["pool", "data", "fresh", "full"])
def bench_train_step(benchmark, rollout):
    trainer = Trainer(TrainConfig(rollout=rollout), load_pretrained())
    trainer.train_step()  # fills the pool
    filling = trainer.state.reference_evaluations
    benchmark.group = "training step, demo, batch 128"
    benchmark.pedantic(trainer.train_step, warmup_rounds=3, rounds=20)
    samples = (trainer.state.step - 1) * trainer.config.train_batch_size
    benchmark.extra_info["reference_evaluations_per_sample"] = (trainer.state.reference_evaluations - filling) / samples
