"""The CUDA optimizer's table, blocks, tails and alignments, thread after thread on the CPU: the bits of the CPU kernel."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from selfnpo_kernels import fused_adamw_, split_weights

HERE = Path(__file__).parent / "cuda_on_cpu"
POINTERS = ("param", "low", "grad", "exp_avg", "exp_avg_sq", "ema", "ema_low")


class AdamWTensor(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in POINTERS), ("elements", ctypes.c_int64)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("cuda") / "adamw.so"
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", f"-I{HERE}"]
    subprocess.run(["c++", *flags, HERE / "adamw.cpp", "-o", path], check=True)
    return ctypes.CDLL(str(path))


def at_odd_address(tensor):
    """The same numbers, one element off any alignment."""
    return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_tails_and_tables(library, dtype, split, average):
    sizes = [1, 0, 3, 4, 4095, 4096, 4097, 9000, *[5] * 500]  # more tensors than one launch takes
    torch.manual_seed(0)
    weights, averages = ([torch.randn(size) for size in sizes] for _ in range(2))
    grads = [torch.randn(size).to(dtype) for size in sizes]
    grads[4], weights[5] = at_odd_address(grads[4]), at_odd_address(weights[5])
    lists = {"grad": grads, "exp_avg": [torch.randn(n) for n in sizes], "exp_avg_sq": [torch.rand(n) for n in sizes]}
    for name, values in (("param", weights), ("ema", averages)):
        if name == "ema" and not average:
            continue
        lists[name] = values
        if split:
            lists[name], lists["low" if name == "param" else "ema_low"] = map(
                list, zip(*map(split_weights, values), strict=True)
            )
    expected = {name: [tensor.clone() for tensor in values] for name, values in lists.items()}
    step, lr, scale = torch.tensor(7), torch.tensor(1e-2), torch.tensor(0.5)

    fused_adamw_(
        expected["param"], expected["grad"], expected["exp_avg"], expected["exp_avg_sq"], step=step, lr=lr, grad_scale=scale,
        lows=expected.get("low"), emas=expected.get("ema"), ema_lows=expected.get("ema_low"), weight_decay=0.1,
        ema_decay=0.9,
    )  # fmt: skip
    rows = [
        AdamWTensor(*(lists[name][k].data_ptr() if name in lists else None for name in POINTERS), size)
        for k, size in enumerate(sizes)
    ]
    settings = (ctypes.c_double * 5)(0.9, 0.999, 1e-8, 0.1, 0.9)
    code = [torch.float32, torch.bfloat16, torch.float16].index(dtype)
    scalars = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (step, lr, scale)]
    launches = library.run((AdamWTensor * len(rows))(*rows), len(rows), code, settings, *scalars)
    assert launches == 2
    for name, values in lists.items():
        for ours, theirs in zip(values, expected[name], strict=True):
            assert ours.equal(theirs), name
