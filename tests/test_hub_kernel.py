"""selfnpo_kernels as a kernel of the Hugging Face hub, laid out by hub_kernel.py."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import selfnpo_kernels

ROOT = Path(__file__).parents[1]

OPS = """import torch
ops = torch.ops._selfnpo_kernels_cpu_test
def add_op_namespace_prefix(op_name): return f"_selfnpo_kernels_cpu_test::{op_name}"
"""


@pytest.fixture
def hub_kernel(tmp_path) -> Path:
    folder = tmp_path / "hub-kernel"
    subprocess.run([sys.executable, "tests/hub_kernel.py", folder], cwd=ROOT, check=True)
    return folder


@pytest.mark.filterwarnings("ignore:.*runs on the slower reference")
def test_the_kernel_of_the_hub_runs_beside_the_installed_one(hub_kernel, monkeypatch):
    """As the package `kernels` imports it: from a path, under a name of its own, with the namespace of the builder."""
    package = hub_kernel / "torch-ext" / "selfnpo_kernels"
    assert {path.relative_to(package) for path in package.rglob("*.py")} == {
        path.relative_to(ROOT / "selfnpo_kernels") for path in (ROOT / "selfnpo_kernels").rglob("*.py")
    }
    (package / "_ops.py").write_text(OPS)
    spec = importlib.util.spec_from_file_location("a_kernel_of_the_hub", package / "__init__.py")
    kernel = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, kernel)
    spec.loader.exec_module(kernel)
    x, rows = torch.randn(3, 4), torch.randn(3, 2)
    assert kernel.tweedie(x, x, rows).equal(selfnpo_kernels.reference.tweedie(x, x, rows))
    assert kernel.registration.ops is torch.ops._selfnpo_kernels_cpu_test
    assert kernel.__version__ == selfnpo_kernels.__version__
    for path in package.rglob("*.py"):
        assert not re.search(r"^ *(from|import) selfnpo_kernels", path.read_text(), re.MULTILINE), path


def test_the_builder_reads_its_settings(hub_kernel):
    builder = pytest.importorskip("kernels._rust", reason="pip install kernels")
    assert [str(backend) for backend in builder.Build.open(hub_kernel).general.backends] == ["cpu", "cuda"]
