"""What a GPU will be given compiles for it, and keeps its values in registers."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from triton.backends import nvidia

import jit_launches
from selfnpo_kernels import extension

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".pytest_cache" / "triton"


@pytest.mark.parametrize("architecture", [90, *(pytest.param(other, marks=pytest.mark.slow) for other in (80, 100))])
def test_every_triton_launch_compiles_as_the_jit_does_it(architecture):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, HERE / "jit_launches.py", str(architecture), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"TRITON_CACHE_DIR": str(CACHE)})
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found["failures"] == {}
    assert done.returncode == 0
    assert found["launches"] > 500
    constants = found["constants"]
    names = {"guided_step", "forward_jump", "moments", "cfg_combine", "x0_loss", "x0_loss_backward"}
    assert {re.sub("_kernel$", "", kernel) for kernel in constants} == names
    for kernel, flags in constants.items():  # every variant of every kernel was there
        for flag, values in flags.items():
            if isinstance(values[0], bool):
                assert values == [False, True], (kernel, flag)
    assert constants["x0_loss_backward_kernel"]["OPERAND"] == [0, 1, 2]
    assert [kernel for kernel in found["kernels"] if kernel["spilled"]] == []


def test_the_launches_are_told_in_a_table():
    kernel = {"kernel": "moments_kernel", "registers": 30, "spilled": 0}
    kernels, failures = [kernel, kernel | {"registers": 40}], {"moments, (3, 4)": "TypeError: no"}
    found = {"launches": 7, "failures": failures, "kernels": kernels}
    header, row, summary, failure = jit_launches.table(found).splitlines()
    assert header.split() == ["kernel", "variants", "registers", "bytes", "spilled"]
    assert row.split() == ["moments_kernel", "2", "30", "to", "40", "0"]
    assert (summary, failure) == ("7 launches, 1 failed", "moments, (3, 4): TypeError: no")


def test_the_cuda_optimizer_keeps_its_values_in_registers():
    if not extension._C.cuda_architectures:
        pytest.skip("the extension was built without nvcc")
    tool = shutil.which("cuobjdump") or Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    done = subprocess.run([tool, "-res-usage", extension._C.__file__], capture_output=True, text=True, check=True)
    usage = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    architectures = re.search(r": ([\d ]+) \+ PTX", extension._C.cuda_architectures)[1].split()
    assert len(usage) >= 6 * len(architectures)  # three gradient dtypes, two layouts
    assert all(stack == local == "0" for _, stack, local in usage)
