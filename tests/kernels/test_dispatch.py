"""Which backend runs, and what is said where it cannot."""

import os
import subprocess
import sys

import pytest
import torch
from cases import inputs

from selfnpo_kernels import backend, dispatch, extension, forward_jump, reference, tweedie


def call(dtype=torch.float32):
    t = inputs((3, 40), dtype)
    return tweedie(t.sample, t.cond, t.rows[:, :2])


def test_the_extension_was_built():
    assert extension._C is not None, extension.describe()


def test_the_device_chooses():
    assert dispatch.choose("tweedie", torch.zeros(1)) == "cpp"
    assert dispatch.choose("tweedie", torch.zeros(1, dtype=torch.float64)) == "reference"
    assert dispatch.choose("tweedie", torch.zeros(1, device="meta")) == "reference"


def test_forced_backends_run_and_end(monkeypatch):
    calls = []
    monkeypatch.setattr(reference, "tweedie", lambda *args: calls.append(args) or args[0])
    with backend("reference"):
        call()
        with backend("cpp"):
            call()
        assert len(calls) == 1
        call()
    assert len(calls) == 2
    call()
    assert len(calls) == 2


def test_the_environment_forces(monkeypatch):
    monkeypatch.setenv("SELFNPO_BACKEND", "reference")
    assert dispatch.choose("tweedie", torch.zeros(1)) == "reference"
    assert "forced to reference" in dispatch.describe()
    with backend("cpp"):
        assert dispatch.choose("tweedie", torch.zeros(1)) == "cpp"
    monkeypatch.setenv("SELFNPO_BACKEND", "cuda")
    with pytest.raises(ValueError, match="SELFNPO_BACKEND got 'cuda'; expected one of reference, cpp, triton"):
        call()


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"backend\(\) got 'gpu'"), backend("gpu"):
        pass


def test_forcing_what_cannot_run_says_why(monkeypatch):
    with (
        backend("cpp"),
        pytest.raises(RuntimeError, match="'cpp': it computes in float32 on float32, bfloat16"),
    ):
        call(torch.float64)
    with (
        backend("cpp"),
        pytest.raises(RuntimeError, match="it runs on the CPU, the tensor is on meta; use triton"),
    ):
        dispatch.choose("tweedie", torch.zeros(1, device="meta"))
    with backend("triton"):
        with pytest.raises(RuntimeError, match="it runs on CUDA devices, the tensor is on meta"):
            dispatch.choose("tweedie", torch.zeros(1, device="meta"))
        monkeypatch.setattr(dispatch, "triton_failure", lambda: "No module named 'triton'")
        with pytest.raises(RuntimeError, match="Triton does not import"):
            call()
    monkeypatch.setattr(extension, "_C", None)
    with backend("cpp"), pytest.raises(RuntimeError, match="the extension is not available"):
        call()


def test_without_interpreter_triton_needs_a_gpu():
    code = (
        "import torch, selfnpo_kernels as k\n"
        "with k.backend('triton'): k.tweedie(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 2))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "it runs on CUDA devices, the tensor is on cpu (TRITON_INTERPRET=1" in done.stderr


def test_without_the_extension_it_says_so_and_draws_the_same_noise(monkeypatch):
    t = inputs((4, 10))
    expected = forward_jump(t.sample, t.rows[:, :2], 1, 2, t.ids)
    monkeypatch.setattr(extension, "_C", None)
    with pytest.warns(RuntimeWarning, match="forward_jump runs on the slower reference: the extension is not available"):
        result = forward_jump(t.sample, t.rows[:, :2], 1, 2, t.ids)
    assert (result - expected).abs().max() < 2e-6


def test_dtypes_without_a_kernel_take_the_reference():
    assert call(torch.float64).dtype == torch.float64
    assert call(torch.float8_e4m3fn).dtype == torch.float8_e4m3fn
