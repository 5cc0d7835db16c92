"""Which backend runs, and what is said where it cannot."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from cases import inputs
from selfnpo_kernels import backend, dispatch, extension, forward_jump, reference, tweedie


def call(dtype=torch.float32):
    t = inputs((3, 40), dtype)
    return tweedie(t.sample, t.cond, t.rows[:, :2])


def test_the_extension_was_built():
    assert extension._C is not None, extension.state()


def test_the_device_chooses():
    assert dispatch.backend_for("tweedie", torch.zeros(1)) == "cpp"
    assert dispatch.backend_for("tweedie", torch.zeros(1, dtype=torch.float64)) == "reference"
    assert dispatch.backend_for("tweedie", torch.zeros(1, device="meta")) == "reference"


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
    assert dispatch.backend_for("tweedie", torch.zeros(1)) == "reference"
    assert "forced to reference" in dispatch.summary()
    with backend("cpp"):
        assert dispatch.backend_for("tweedie", torch.zeros(1)) == "cpp"
    monkeypatch.setenv("SELFNPO_BACKEND", "cuda")
    with pytest.raises(ValueError, match="SELFNPO_BACKEND got 'cuda'; expected one of reference, cpp, triton"):
        call()


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"backend\(\) got 'gpu'"), backend("gpu"):
        pass


def test_forcing_what_cannot_run_says_why(monkeypatch):
    with backend("cpp"):
        with pytest.raises(RuntimeError, match="'cpp': it computes in float32 on float32, bfloat16"):
            call(torch.float64)
        with pytest.raises(RuntimeError, match="it runs on the CPU, but the tensor is on meta; use triton"):
            dispatch.backend_for("tweedie", torch.zeros(1, device="meta"))
    with backend("triton"):
        with pytest.raises(RuntimeError, match="it runs on CUDA devices, but the tensor is on meta"):
            dispatch.backend_for("tweedie", torch.zeros(1, device="meta"))
        monkeypatch.setattr(dispatch, "triton_failure", lambda: "Triton is too old")
        with pytest.raises(RuntimeError, match="'triton': Triton is too old"):
            call()
    monkeypatch.setattr(extension, "_C", None)
    with backend("cpp"), pytest.raises(RuntimeError, match="the extension is not available"):
        call()


def test_a_triton_that_cannot_run_the_kernels_is_named(monkeypatch):
    failure = dispatch.triton_failure.__wrapped__
    assert failure() is None
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert failure() == "Triton 3.5.1 is too old; run pip install 'triton>=3.6'"
    monkeypatch.delattr(tl, "cast")
    assert failure().startswith("Triton 3.5.1 has no triton.language.cast; install a tested release")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert failure().startswith("Triton cannot be imported (")


def test_the_floor_of_triton_is_the_declared_one():
    declared = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"triton>={dispatch.TRITON_FLOOR};' in declared


def test_every_name_that_the_kernels_take_from_triton_is_checked():
    folder = Path(dispatch.__file__).parent / "triton_kernels"
    used = {name for path in folder.glob("*.py") for name in re.findall(r"\btl\.(\w+)", path.read_text())}
    oldest = {
        "arange", "constexpr", "float32", "int32", "int64", "load", "program_id", "reshape", "store", "sum", "uint32",
        "uint64", "where", "zeros", "zeros_like",
    }  # fmt: skip
    assert used - oldest == set(dispatch.TRITON_NAMES)


def test_what_stands_in_the_way_on_a_gpu(monkeypatch):
    """An older GPU and an extension without CUDA: the reference, and a warning that says why."""
    there = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
    capability = [7, 5]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    for cuda in ("triton", "cpp"):
        monkeypatch.setattr(extension, "_C", SimpleNamespace(cuda_architectures="80", compiler="c++"))
        with pytest.warns(
            RuntimeWarning, match=r"reference: the kernels need a GPU with sm_80 or later, but this one has sm_75"
        ):
            assert dispatch.backend_for("op", there, cuda=cuda) == "reference"
    capability[:] = [8, 0]
    assert dispatch.backend_for("op", there) == "triton"
    assert dispatch.backend_for("op", there, cuda="cpp") == "cpp"
    monkeypatch.setattr(extension, "_C", SimpleNamespace(cuda_architectures="", compiler="c++"))
    with pytest.warns(RuntimeWarning, match=r"reference: the extension is built by c\+\+, no CUDA: built without nvcc"):
        assert dispatch.backend_for("op", there, cuda="cpp") == "reference"


def test_without_interpreter_triton_needs_a_gpu():
    code = (
        "import torch, selfnpo_kernels as k\n"
        "with k.backend('triton'): k.tweedie(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 2))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "it runs on CUDA devices, but the tensor is on cpu (TRITON_INTERPRET=1" in done.stderr


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
