"""The noise: Random123's known answers, statistics, and independence of everything but its address."""

import itertools

import pytest
import torch
from scipy import stats

from selfnpo_kernels import philox_normal, philox_uniform
from selfnpo_kernels.philox import philox_4x32

ALL_ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, answer):
    assert philox_4x32(torch.tensor(counter), key[0] | key[1] << 32).tolist() == list(answer)


def test_normals_are_standard_normal():
    noise = philox_normal((64, 1, 4096), 7, 0, 0, torch.arange(64)).flatten().double()
    n = len(noise)
    assert abs(noise.mean()) < 4 / n**0.5
    assert abs(noise.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((noise**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-3


def test_uniforms_are_uniform():
    assert stats.kstest(philox_uniform(3, 1, 2, torch.arange(20000)).numpy(), "uniform").pvalue > 1e-3


def test_every_part_of_the_address_gives_independent_noise():
    ids = torch.tensor([0])
    addresses = itertools.product((1, 2, 2**40), (0, 1), (0, 1), (ids, ids + 1))
    draws = torch.stack([philox_normal((1, 20000), *address)[0] for address in addresses])
    correlation = torch.corrcoef(draws) - torch.eye(len(draws))
    assert correlation.abs().max() < 5 / 20000**0.5


def test_noise_depends_on_the_sample_id_alone_not_on_the_batch():
    together = philox_normal((5, 3, 7), 1, 2, 3, torch.tensor([9, 4, 4, 0, 7]))
    assert together[1].equal(together[2])
    assert together[3:4].equal(philox_normal((1, 3, 7), 1, 2, 3, torch.tensor([0])))


def test_elements_that_are_no_multiple_of_four_are_a_prefix():
    assert philox_normal((1, 5), 1, 0, 0, torch.tensor([0])).equal(philox_normal((1, 8), 1, 0, 0, torch.tensor([0]))[:, :5])


def test_double_precision_is_the_same_noise():
    single, double = (philox_normal((2, 1000), 5, 0, 0, torch.arange(2), dtype) for dtype in (torch.float32, torch.float64))
    assert (single - double).abs().max() < 1e-6


def test_ids_must_match_the_batch():
    with pytest.raises(ValueError, match="one id per sample"):
        philox_normal((3, 4), 0, 0, 0, torch.arange(2))
