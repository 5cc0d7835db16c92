"""Means, intervals and paired differences; what an evaluation samples; and that Self-NPO is worth it."""

import math

import pytest
from scipy import stats

from selfnpo.config import TrainConfig
from selfnpo.demo.config import CFG, NONE, SEEDS, SELF_NPO
from selfnpo.demo.evaluation import Estimate, Evaluation, evaluate
from selfnpo.demo.experiment import fine_tune
from selfnpo.demo.metrics import Metrics
from selfnpo.inputs.digits import halves


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [0.3, -4.0], [33.1, 32.9, 33.4, 30.0, 31.0, 35.5]])
def test_the_interval_is_students(values):
    found, sem = Estimate.of(values), stats.sem(values)
    expected = stats.t.interval(0.95, len(values) - 1, loc=found.mean, scale=sem)
    assert found.mean == pytest.approx(sum(values) / len(values))
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(expected)


def test_the_interval_of_one_two_three():
    assert Estimate.of([1.0, 2.0, 3.0]).half_width == pytest.approx(4.3027 / 3**0.5, rel=1e-4)  # t of two degrees of freedom


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(-24.219, 0.0801), "-24.219 ± 0.080"),
        (Estimate(0.00512, 0.00648), "+0.0051 ± 0.0065"),
        (Estimate(48.1, 18.4), "+48 ± 18"),
        (Estimate(1234.5, 432.1), "+1234 ± 432"),
        (Estimate(0.25, 0.0), "+0.250 ± 0.000"),
        (Estimate(0.25, math.nan), "+0.250"),
    ],
)
def test_how_an_estimate_is_printed(estimate, text):
    assert f"{estimate:+}" == text
    assert f"{estimate}" == text.removeprefix("+")


@pytest.mark.parametrize(
    ("mean", "half_width", "holds"),
    [
        (1.0, 0.5, False),
        (-1.0, 0.5, False),
        (0.5, 1.0, True),
        (1.004, 0.996, True),  # it does not, but is printed as 1.00 ± 1.00
        (0.25, 0.0, False),
        (0.0, 0.0, True),
        (0.25, math.nan, True),  # of one replicate nothing is decided
    ],
)
def test_whether_an_interval_holds_zero(mean, half_width, holds):
    assert Estimate(mean, half_width).holds_zero() == holds


def test_differences_are_paired():
    """The replicates differ far more than the methods, and every method always by 2."""
    values = {CFG: {2.0: [1.0, 50.0, -30.0], 3.0: [5.0, 6.0, 7.0]}, SELF_NPO: {2.0: [3.0, 52.0, -28.0]}}
    rows = {arm: {scale: [{"fd": v} for v in each] for scale, each in found.items()} for arm, found in values.items()}
    evaluation = Evaluation(rows, num_samples=1, seeds=(0, 1, 2))
    assert evaluation.difference(SELF_NPO, 2.0, "fd") == Estimate(2.0, 0.0)
    assert evaluation.difference(CFG, 2.0, "fd", SELF_NPO) == Estimate(-2.0, 0.0)
    assert evaluation.difference(SELF_NPO, 2.0, "fd", CFG, 3.0).mean == pytest.approx(27 / 3 - 6)
    assert evaluation.estimate(SELF_NPO, 2.0, "fd").half_width > 50


def test_arms_share_noise_and_labels(demo):
    """A negative that is the base itself is plain guidance, bit for bit; another seed is other noise."""
    asked = []

    def metrics(images, labels):
        asked.append(labels)
        return {"mean": images.mean().item()}

    models = [{SELF_NPO: demo.denoiser}] * 2
    values = evaluate(demo, metrics, models, seeds=(1, 2), guidance_scales=(1.5, 3.0), num_samples=20).values
    assert values.keys() == {NONE, CFG, SELF_NPO}
    assert values[CFG] == values[SELF_NPO]
    assert values[CFG].keys() == {1.5, 3.0}
    assert len({row["mean"] for rows in (*values[CFG].values(), *values[NONE].values()) for row in rows}) == 6
    assert len(asked) == 2 * 5
    assert all(labels.tolist() == [*range(10)] * 2 for labels in asked)


def test_self_npo_beats_plain_guidance(demo):
    """A tenth of the default's steps at a higher learning rate: over eight seeds fd was 11 to 17, with plain guidance 29 to
    36."""
    negative = fine_tune(TrainConfig(max_train_steps=200, train_batch_size=64, learning_rate=3e-4), demo)
    judges = Metrics(halves()[1], seeds=(0,))
    evaluation = evaluate(demo, judges, [{SELF_NPO: negative}], SEEDS[:1], guidance_scales=(3.0,), num_samples=500)
    (plain,), (ours,) = ([row["fd"] for row in evaluation.values[arm][3.0]] for arm in (CFG, SELF_NPO))
    assert ours < 0.75 * plain
