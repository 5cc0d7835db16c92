"""theta + alpha eta + beta delta."""

import torch
from torch import nn

from selfnpo.merge import mix_


def test_the_shares_of_both_offsets():
    theta, delta, eta = (nn.Linear(3, 2) for _ in range(3))
    negative, positive = nn.Linear(3, 2), nn.Linear(3, 2)

    def mixed(*arguments, **shares):
        for model, offset in ((negative, delta), (positive, eta)):
            for result, base, change in zip(*map(nn.Module.parameters, (model, theta, offset)), strict=True):
                result.data = base.data + change.data
        trained = negative.weight.clone()
        mix_(negative, theta, *arguments, **shares)
        return negative.weight, trained

    whole, trained = mixed()
    assert whole.equal(trained)
    nothing, _ = mixed(beta=0)
    assert nothing.equal(theta.weight)
    half, _ = mixed(positive, alpha=0.25, beta=0.5)
    torch.testing.assert_close(half, theta.weight + 0.25 * eta.weight + 0.5 * delta.weight)
