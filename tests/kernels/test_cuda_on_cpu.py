"""The CUDA optimizer's table, blocks, tails and alignments, thread after thread on the CPU: the bits of the CPU kernel."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from cases import ADAMW_SIZES, DTYPES, adamw_lists
from selfnpo_kernels import fused_adamw_

HERE = Path(__file__).parent / "cuda_on_cpu"
LISTS = ("params", "lows", "grads", "exp_avgs", "exp_avg_sqs", "emas", "ema_lows")


class AdamWTensor(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in LISTS), ("elements", ctypes.c_int64)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("cuda") / "adamw.so"
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", f"-I{HERE}"]
    subprocess.run(["c++", *flags, HERE / "adamw.cpp", "-o", path], check=True)
    return ctypes.CDLL(str(path))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_tails_and_tables(library, dtype, split, average):
    lists = adamw_lists(dtype, split, average)
    expected = {name: [tensor.clone() for tensor in tensors] for name, tensors in lists.items()}
    step, lr, scale = torch.tensor(7), torch.tensor(1e-2), torch.tensor(0.5)
    fused_adamw_(**expected, step=step, lr=lr, grad_scale=scale, weight_decay=0.1, ema_decay=0.9)
    rows = [
        AdamWTensor(*(lists[name][k].data_ptr() if name in lists else None for name in LISTS), size)
        for k, size in enumerate(ADAMW_SIZES)
    ]
    settings = (ctypes.c_double * 5)(0.9, 0.999, 1e-8, 0.1, 0.9)
    scalars = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (step, lr, scale)]
    launches = library.run((AdamWTensor * len(rows))(*rows), len(rows), DTYPES.index(dtype), settings, *scalars)
    assert launches == 2
    for name, tensors in lists.items():
        for ours, theirs in zip(tensors, expected[name], strict=True):
            assert ours.equal(theirs), name
