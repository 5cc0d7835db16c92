"""Every kernel compiles for GPUs that are not here, and keeps its values in registers."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from triton.backends import nvidia

from selfnpo_kernels import extension

HERE = Path(__file__).parent


def test_triton_kernels_compile_without_spills():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, HERE / "compile_ahead.py"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    kernels = {re.sub("_kernel$", "", row["kernel"]) for row in rows}
    assert kernels == {"guided_step", "forward_jump", "moments", "cfg_combine", "x0_loss", "x0_loss_backward"}
    assert {row["architecture"] for row in rows} == {80, 90, 100}
    for row in rows:
        assert row["cubin"] > 0
        assert row["spills_reported"] == 2, row  # ptxas named stores and loads
        assert row["spilled"] == 0, row


def test_the_cuda_optimizer_keeps_its_values_in_registers():
    if not extension._C.cuda_architectures:
        pytest.skip("the extension was built without nvcc")
    tool = shutil.which("cuobjdump") or Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    done = subprocess.run([tool, "-res-usage", extension._C.__file__], capture_output=True, text=True, check=True)
    usage = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    architectures = re.search(r": ([\d ]+) \+ PTX", extension._C.cuda_architectures)[1].split()
    assert len(usage) >= 6 * len(architectures)  # three gradient dtypes, two layouts
    assert all(stack == local == "0" for _, stack, local in usage)
