"""theta + alpha eta + beta delta."""

import pytest
import torch
from torch import nn

from selfnpo.export.merged import formula
from selfnpo.mixing import mix_, mixed


def test_the_shares_of_both_offsets():
    theta, delta, eta = (nn.Linear(3, 2) for _ in range(3))
    negative, positive = nn.Linear(3, 2), nn.Linear(3, 2)

    def mix(*arguments, **shares):
        for model, offset in ((negative, delta), (positive, eta)):
            for result, base, change in zip(*map(nn.Module.parameters, (model, theta, offset)), strict=True):
                result.data = base.data + change.data
        trained = negative.weight.clone()
        mix_(negative, theta, *arguments, **shares)
        return negative.weight, trained

    whole, trained = mix()
    assert whole.equal(trained)
    nothing, _ = mix(beta=0)
    assert nothing.equal(theta.weight)
    half, _ = mix(positive, alpha=0.25, beta=0.5)
    torch.testing.assert_close(half, theta.weight + 0.25 * eta.weight + 0.5 * delta.weight)


@pytest.mark.parametrize("k", [0.01, 0.5, 1.5, 10])
def test_a_negative_share_extrapolates(k):
    torch.manual_seed(0)
    theta, delta = torch.randn(100_000), 0.01 * torch.randn(100_000)
    exact = theta.double() - k * ((theta + delta).double() - theta.double())
    result = mixed(theta, theta + delta, None, 1.0, -k)
    assert ((result.double() - exact).abs() <= 2**-23 * (theta.abs() + (1 + k) * delta.abs())).all()


@pytest.mark.parametrize(
    ("shares", "text"),
    [
        ((1, 0.7, False), "theta + 0.7 delta"),
        ((1, -1.5, False), "theta - 1.5 delta"),
        ((0.25, 1, True), "theta + 0.25 eta + 1 delta"),
    ],
)
def test_what_was_written_is_said_as_a_formula(shares, text):
    assert formula(*shares) == text
