"""A replayed step is the step: the same losses, weights, moments, samples, counters, however reference and student run."""

import pytest
import torch
from torch import Tensor

from runs import RANKS
from selfnpo.training.trainer import Trainer
from selfnpo_kernels import join_weights

pytestmark = pytest.mark.gpu

MODELS = ["demo", "stable_diffusion"]
STEPS = 20  # of which the first five are not replayed
SHARES = {"no": 1e-3, "bf16": 1e-2}  # by which two runs may differ where libraries choose other kernels for a graph


def progress(trainer: Trainer) -> dict[str, Tensor]:
    """What a run has come to, in float32."""
    student, moments = trainer.state.student, trainer.state.optimizer.tensors().items()
    low_halves = student.averaged_low_halves
    found = {
        "weights": student.masters().values(),
        "average": [join_weights(high, low_halves[name]) if low_halves else high for name, high in student.averaged.items()],
        "first moments": [value for name, value in moments if name.endswith(".exp_avg")],
        "second moments": [value for name, value in moments if name.endswith(".exp_avg_sq")],
        "samples": trainer.state.rollout.tensors.values(),
    }
    return {kind: torch.cat([tensor.detach().flatten() for tensor in tensors]) for kind, tensors in found.items()}


def counters(trainer: Trainer) -> list[Tensor]:
    """Counters, rates, and which trajectories are where."""
    state = trainer.state
    return [trainer.step.counter, state.optimizer.count, state.optimizer.lr, *state.rollout.place(trainer.step.counter)]


def assert_same_run(begin, trained, model: str, **changes: object) -> None:
    share, start = SHARES[changes["mixed_precision"]], progress(begin(model, **changes))
    (eager, expected), (captured, losses) = (trained(STEPS, model, capture=way, **changes) for way in ("off", "on"))
    assert losses == pytest.approx(expected, rel=share)
    assert len(set(losses)) == STEPS  # every step has samples and noise of its own
    assert captured.state.scalars() | {"startup_seconds": 0} == eager.state.scalars() | {"startup_seconds": 0}
    assert captured.state.step == int(captured.step.counter) + 1 == int(captured.state.optimizer.count) == STEPS
    assert all(one.equal(other) for one, other in zip(counters(captured), counters(eager), strict=True))
    for (kind, before), one, other in zip(start.items(), progress(eager).values(), progress(captured).values(), strict=True):
        moved = (one - before).norm()
        assert moved > 0, kind
        assert (other - one).norm() <= share * moved, kind


@pytest.mark.parametrize("precision", SHARES)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("model", MODELS)
def test_captured_steps_are_the_uncaptured_ones(begin, trained, model, rank, precision):
    assert_same_run(
        begin, trained, model, rank=rank, mixed_precision=precision, rollout_guidance_scale=2.0, max_train_steps=40
    )


@pytest.mark.parametrize("rank", RANKS)
def test_accumulated_gradients_are_captured(begin, trained, rank):
    assert_same_run(begin, trained, "stable_diffusion", rank=rank, mixed_precision="bf16", gradient_accumulation_steps=2)


@pytest.mark.parametrize("compile", [False, True])
def test_checkpointed_gradients_are_captured(begin, trained, compile):
    changes = {"mixed_precision": "bf16", "gradient_checkpointing": True, "compile": compile}
    assert_same_run(begin, trained, "stable_diffusion", rank=0, **changes)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("model", MODELS)
def test_parallel_branches_are_the_sequence(trained, model, rank):
    runs = {tandem: trained(STEPS, model, capture="on", tandem=tandem, rank=rank) for tandem in ("sequential", "streams")}
    assert runs["streams"][0].state.strategy == "streams"
    assert runs["streams"][1] == pytest.approx(runs["sequential"][1], rel=SHARES["no"])


@pytest.mark.parametrize("decay", [1.0, 0.999])
@pytest.mark.parametrize("model", MODELS)
def test_one_pass_is_the_sequence(trained, model, decay):
    changes = {"capture": "on", "rank": 2, "reference_decay": decay}
    runs = {tandem: trained(STEPS, model, tandem=tandem, **changes) for tandem in ("sequential", "shared")}
    assert runs["shared"][0].state.strategy == "shared"
    assert runs["shared"][1] == pytest.approx(runs["sequential"][1], rel=SHARES["no"])
