"""The metrics on sets whose answer is known, and against independent implementations."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F

from selfnpo.demo.metrics import HIGHER_IS_BETTER, METRICS, K, Metrics, compare, frechet_distance
from selfnpo.inputs.digits import halves


@pytest.fixture(scope="module")
def held_out():
    return halves()[1]


@pytest.fixture(scope="module")
def metrics(held_out):
    return Metrics(held_out, seeds=(0, 1))


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def test_frechet_distance_of_equal_sets_is_zero(draw):
    features = draw(300, 6)
    assert frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_gaussians(draw):
    """Between N(m, s^2) and N(m', s'^2) it is (m - m')^2 + (s - s')^2, summed over independent dimensions."""
    white = torch.linalg.qr(draw(300, 3) - draw(300, 3).mean(0))[0]
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(white.T))).T  # mean 0, covariance 1, exactly
    for mean, scale in (([3.0, 0.0, -4.0], [1.0, 1.0, 1.0]), ([0.0] * 3, [2.0, 0.5, 1.0]), ([1.0, 2.0, 0.0], [3.0] * 3)):
        shift, factor = torch.tensor(mean).double(), torch.tensor(scale).double()
        expected = (shift.square() + (factor - 1).square()).sum().item()
        assert frechet_distance(white * factor + shift, white) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_against_scipy(draw):
    a, b = (draw(200, 8) @ draw(8, 8) + draw(8) for _ in range(2))
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    expected = (a.mean(0) - b.mean(0)).square().sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def in_balls(points, centres):
    """[point, centre]: is the point in the centre's ball, which reaches to its K-th nearest other centre?"""
    nearest = NearestNeighbors(n_neighbors=K + 1, algorithm="kd_tree").fit(centres)
    radii = nearest.kneighbors(centres)[0][:, K]  # the nearest is the centre itself
    return np.linalg.norm(points[:, None] - centres, axis=-1) <= radii


def test_balls_against_scikit_learn(draw):
    fake, real = draw(80, 4) + 1, draw(120, 4)
    inside, outside = in_balls(fake.numpy(), real.numpy()), in_balls(real.numpy(), fake.numpy())
    expected = {
        "precision": inside.any(1).mean(),
        "recall": outside.any(1).mean(),
        "density": inside.sum(1).mean() / K,
        "coverage": inside.any(0).mean(),
    }
    found = compare(fake, real)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert len({*expected.values()}) == 4
    assert all(0.2 < value < 0.95 for value in expected.values())  # none of them is trivial


def test_an_outlier_has_recall_and_no_coverage(draw):
    """Its ball reaches over all real samples to the other generated ones, which lie far on the other side."""
    real = draw(200, 2)
    fake = torch.cat([0.1 * draw(20, 2) - torch.tensor([10.0, 0]), torch.tensor([[100.0, 0]])])
    found = compare(fake, real)
    assert (found["recall"], found["coverage"], found["precision"], found["density"]) == (1, 0, 0, 0)


def test_collapsed_samples_have_precision_and_no_variety(draw):
    real = draw(200, 2)
    found = compare(real[0] + 1e-4 * draw(50, 2), real)
    assert found["precision"] == 1
    assert found["recall"] <= 1 / 200
    assert found["coverage"] < 0.1


def test_the_real_set_itself_is_perfect(draw):
    real = draw(100, 3)
    found = compare(real, real)
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    assert found["density"] == pytest.approx((K + 1) / K, rel=0.01)  # every ball holds its centre and K others
    assert found["fd"] == pytest.approx(0, abs=1e-9)


def test_nearest_digits_against_scikit_learn(metrics, held_out, draw):
    images, labels = draw(60, 1, 8, 8).float(), torch.arange(60) % 10
    expected = []
    for image, label in zip(images, labels, strict=True):
        asked = held_out.images[held_out.labels == label].flatten(1)
        nearest = NearestNeighbors(n_neighbors=5, algorithm="kd_tree").fit(asked.numpy())
        expected.append(nearest.kneighbors(image.reshape(1, 64).numpy())[0].mean() / 8)  # RMS: of 64 pixels
    assert metrics.nearest(images, labels).numpy() == pytest.approx(np.array(expected), rel=1e-4)
    assert metrics(images, labels)["nn"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_nearest_digits_of_a_set_that_lies_elsewhere(metrics, held_out):
    """A constant offset c of every pixel has RMS c, beside which the differences between digits vanish."""
    assert metrics.nearest(held_out.images[:30] + 1000, held_out.labels[:30]).numpy() == pytest.approx(1000, rel=2e-3)


def test_log_probability_is_the_judges_cross_entropy(metrics, held_out):
    found = metrics(held_out.images, held_out.labels)["lp"]
    losses = [F.cross_entropy(judge(held_out.images), held_out.labels).item() for judge in metrics.judges]
    assert found == pytest.approx(-np.mean(losses), rel=1e-5)
    assert metrics(held_out.images, (held_out.labels + 1) % 10)["lp"] < -5 < -0.1 < found


def test_all_metrics_are_means_over_judges(metrics, held_out):
    images, labels = held_out.images[:300].roll(1, -1), held_out.labels[:300]
    found = metrics(images, labels)
    assert found.keys() == {*METRICS} == HIGHER_IS_BETTER.keys()
    by_judge = [
        compare(judge.features(images).double(), judge.features(held_out.images).double()) for judge in metrics.judges
    ]
    for name in by_judge[0]:
        assert found[name] == pytest.approx(np.mean([each[name] for each in by_judge])), name
