"""The noise: Random123's known answers on every backend, statistics, and independence of everything but its address."""

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cases import agree, channels_last, inputs
from selfnpo_kernels import backend, forward_jump, philox_normal, philox_uniform, reference
from selfnpo_kernels.philox import philox_4x32
from triton_words import words_kernel

ROOT = Path(__file__).parents[2]
MASK = 0xFFFFFFFF
# Counter, key, answer: kat_vectors of Random123 (Salmon et al.), philox4x32 10.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def all_cases(count):
    """((counter, key), answer) of the known answers, and of `count` random ones by the specification."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 2**32, (count, 6), generator=generator).tolist()
    cases = [(tuple(row[:4]), tuple(row[4:])) for row in rows]
    answers = [tuple(philox_4x32(torch.tensor(counter), key[0] | key[1] << 32).tolist()) for counter, key in cases]
    return [((counter, key), answer) for counter, key, answer in KNOWN] + list(zip(cases, answers, strict=True))


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_the_specification_knows_the_answers(counter, key, answer):
    assert tuple(philox_4x32(torch.tensor(counter), key[0] | key[1] << 32).tolist()) == answer


@pytest.mark.parametrize("compiler", ["c++", "nvcc"])
def test_native_integers(compiler, tmp_path):
    """csrc/philox.h by the host compiler; by nvcc, on the GPU where there is one."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    language = ["-x", "c++"] if compiler == "c++" else []
    source = ROOT / "tests" / "kernels" / "philox_words.cu"
    subprocess.run(
        [compiler, "-O2", "-std=c++17", f"-I{ROOT / 'csrc'}", *language, source, "-o", tmp_path / "words"], check=True
    )
    cases, answers = zip(*all_cases(200), strict=True)
    text = "\n".join(" ".join(map(str, counter + key)) for counter, key in cases)
    done = subprocess.run([tmp_path / "words"], input=text, capture_output=True, text=True, check=True)
    assert [tuple(map(int, line.split())) for line in done.stdout.splitlines()] == list(answers)


def test_triton_integers():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for (counter, key), answer in all_cases(20):
        out = torch.zeros(4, 4, dtype=torch.int64, device=device)
        first = torch.tensor([counter[0]] * 4, device=device)
        sample_id = torch.tensor([counter[3]], device=device)
        words_kernel[(1,)](out, first, key[0] | key[1] << 32, counter[1], counter[2], sample_id)
        assert out[2].tolist() == list(answer)


def assert_standard_normal(numbers):
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((numbers**power).mean() - moment) < 4 * (variance / len(numbers)) ** 0.5
    assert stats.kstest(numbers.numpy(), "norm").pvalue > 1e-3


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=5), seed=st.integers(0, 2**64 - 1), step=st.integers(0, 2**32 - 1)
)
def test_normals_agree(shape, seed, step):
    ids = torch.arange(shape[0]) * 1_000_003 + step
    exact = reference.philox_normal(shape, seed, step, 1, ids, torch.float64)
    for name in ("cpp", "triton") if torch.Size(shape).numel() < 200 and not torch.cuda.is_available() else ("cpp",):
        with backend(name):
            assert agree(philox_normal(shape, seed, step, 1, ids), exact)


def test_many_normals_agree(place):
    """Every branch of logarithm, sine and cosine."""
    shape = (2, 1 << 16)
    ids = torch.arange(2, device=place.device)
    exact = reference.philox_normal(shape, 5, 0, 0, ids, torch.float64)
    assert agree(philox_normal(shape, 5, 0, 0, ids), exact)


def test_noise_is_what_the_jump_adds(place):
    t = inputs((3, 4, 6, 5), device=place.device)
    rows = torch.tensor([[0.0, 1.0]], device=place.device).expand(3, 2)
    assert forward_jump(t.sample, rows, 1, 2, t.ids, 3).equal(philox_normal(t.sample.shape, 1, 2, 3, t.ids))


def test_noise_depends_on_nothing_but_its_address(place):
    """Not on the batch, the layout, the length of the sample or how seed and step are given."""
    t = inputs((6, 4, 6, 5), device=place.device)
    rows = t.rows[:, :2]
    together = forward_jump(t.sample, rows, 9, 4, t.ids, 1)
    assert forward_jump(t.sample[4:5], rows[4:5], 9, 4, t.ids[4:5], 1).equal(together[4:5])
    assert forward_jump(t.sample.flip(0), rows.flip(0), 9, 4, t.ids.flip(0), 1).flip(0).equal(together)
    assert forward_jump(channels_last(t.sample), rows, 9, 4, t.ids, 1).equal(together)
    seed, step = torch.tensor(9, device=place.device), torch.tensor([4], device=place.device)
    assert forward_jump(t.sample, rows, seed, step, t.ids, 1).equal(together)
    assert forward_jump(t.sample, rows, 9, 4, t.ids + 2**32, 1).equal(together)
    ids = t.ids[:1]
    assert philox_normal((1, 5), 1, 0, 0, ids).equal(philox_normal((1, 8), 1, 0, 0, ids)[:, :5])


def test_low_precision_is_the_same_noise_rounded():
    ids = torch.arange(4)
    noise = philox_normal((4, 100), 3, sample_ids=ids)
    for dtype in (torch.bfloat16, torch.float16):
        assert philox_normal((4, 100), 3, dtype=dtype).equal(noise.to(dtype))
    assert (philox_normal((4, 100), 3, dtype=torch.float64) - noise).abs().max() < 1e-6


def test_normals_are_standard_normal():
    assert_standard_normal(philox_normal((64, 1, 4096), 7).flatten().double())


def test_uniforms_are_uniform():
    assert stats.kstest(philox_uniform(3, 1, 2, torch.arange(20000)).numpy(), "uniform").pvalue > 1e-3


def test_every_part_of_the_address_gives_independent_noise():
    ids = torch.tensor([0])
    addresses = list(itertools.product((1, 2, 2**40), (0, 1), (0, 1), (ids, ids + 1)))
    draws = torch.stack([philox_normal((1, 20000), *address)[0] for address in addresses])
    # Noise, its square and its neighbour: dependence beyond a plain correlation shows as well.
    draws = torch.cat((draws, draws.square() - 1, draws.roll(1, dims=1)))
    correlation = torch.corrcoef(draws) - torch.eye(len(draws))
    assert correlation.abs().max() < 6 / 20000**0.5


def test_two_jumps_compose_to_one_in_distribution():
    count = 1 << 18
    sample, ids = torch.full((1, count), 1.5), torch.tensor([0])
    (a1, b1), (a2, b2) = (0.9, 0.3), (0.7, 0.6)
    middle = forward_jump(sample, torch.tensor([[a1, b1]]), 1, 0, ids)
    end = forward_jump(middle, torch.tensor([[a2, b2]]), 1, 1, ids).double()
    deviation = (a2**2 * b1**2 + b2**2) ** 0.5
    assert_standard_normal((end - a2 * a1 * 1.5)[0] / deviation)
