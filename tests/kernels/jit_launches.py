"""python tests/kernels/jit_launches.py ARCHITECTURE: makes every Triton launch of every op as the JIT does, without a GPU.

A pretended driver names the target, and `JITFunction.run(warmup=True)` binds, specialises and compiles down to machine code
what it would then launch. The interpreter specialises nothing, while on a GPU an argument 1 becomes a constant, which has no
methods; and code that is compiled ahead of time has its argument types written by hand. Both miss what only the JIT does.

`python tests/kernels/jit_launches.py 90` prints one line for each kernel: its variants, the registers per thread, and the
bytes that are spilled to memory, as the machine code says it. Launches that fail follow, with the last line of their error,
and the exit code is 1. `--json` prints the same for each variant, for tests. Run it without TRITON_INTERPRET. Triton keeps
what it compiled under TRITON_CACHE_DIR.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import selfnpo_kernels
from cases import DTYPES, OPS, channels_last, inputs
from selfnpo_kernels import dispatch, philox_normal


def row_major(tensor):
    return tensor


# Many programs, one program, odd sizes, multiples of 16, one sample, one channel, one position, one element, 5-D.
SHAPES = [
    (3, 4, 33, 31),
    (20, 4, 64, 64),
    (1, 4, 8, 8),
    (2, 1, 5, 7),
    (2, 3, 1, 1),
    (1, 1, 1, 1),
    (2, 16, 5, 8, 8),
    (1,),
]
HUGE = (1, 2**31 + 16)  # counted in 64 bits; never filled, and memory that nothing touches is not taken
ALIKE = [(dtype,) * 3 for dtype in DTYPES]  # of sample, model outputs and target
MIXED = (torch.float32, torch.bfloat16, torch.float16)


class PretendedDriver(DriverBase):
    def __init__(self, architecture: int):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_capability(self, *_):
        return divmod(self.target.arch, 10)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError("nothing is launched")

    def map_python_to_cpp_type(self, kind):
        return "int"

    @classmethod
    def is_active(cls):
        return True


class Launches:
    """Stands in for `JITFunction.run`, and keeps what it compiled."""

    def __init__(self):
        self.run, self.count, self.guarded = JITFunction.run, 0, 0
        self.kernels: dict[tuple[str, str], tuple[dict, bytes]] = {}
        self.constants: dict[str, dict[str, set]] = defaultdict(lambda: defaultdict(set))

    def __call__(self, function, *args, grid, warmup, **kwargs):
        if not self.guarded:
            raise AssertionError(
                f"{function.__name__} is launched outside torch.cuda.device_of: on the current GPU, not on its own"
            )
        self.count += 1
        compiled = self.run(function, *args, grid=grid, warmup=True, **kwargs)
        self.kernels[function.__name__, compiled.hash] = compiled.asm["cubin"]
        for name, value in kwargs.items():
            self.constants[function.__name__][name].add(value)
        return compiled

    @contextmanager
    def device_of(self, tensor):
        self.guarded += isinstance(tensor, torch.Tensor)
        try:
            yield
        finally:
            self.guarded -= isinstance(tensor, torch.Tensor)


def calls():
    """(description, call) of every op on every kind of argument."""
    layouts = (row_major, channels_last)
    for shape in SHAPES:
        for layout in layouts if len(shape) in (4, 5) else layouts[:1]:
            for dtypes in (*ALIKE, MIXED) if shape in SHAPES[:1] else (ALIKE[0], MIXED):
                t = inputs(shape, dtypes[0], layout=layout)
                t.cond, t.uncond, t.target = t.cond.to(dtypes[1]), t.uncond.to(dtypes[1]), t.target.to(dtypes[2])
                yield f"{shape} {layout.__name__} {dtypes}", t
    t = inputs((4, 4, 6, 6))
    t.rows = t.rows[:1].expand(4, -1)
    yield "rows that all samples share", t
    t = inputs((1, 16), torch.bfloat16)
    huge = torch.empty(HUGE, dtype=torch.bfloat16)
    t.sample = t.cond = t.uncond = t.target = huge
    t.batched = torch.empty(2 * HUGE[0], HUGE[1], dtype=torch.bfloat16)
    yield f"{HUGE}", t


def noise(t):
    """With small counters, unlike the table of ops, and with those on the device."""
    for seed, step in ((1, 1), (t.seed, t.step)):
        philox_normal(tuple(t.sample.shape), seed, step, 1, t.ids, dtype=t.sample.dtype)


def resources(cubin: bytes, tool: Path) -> dict[str, int]:
    """Registers per thread, and bytes of stack and local memory, into which registers are spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout).groups()
    return {"registers": int(registers), "spilled": int(stack) + int(local)}


def main(architecture: int) -> dict:
    driver.set_active(PretendedDriver(architecture))
    launches = Launches()
    JITFunction.run = lambda self, *args, **kwargs: launches(self, *args, **kwargs)
    torch.cuda.device_of = launches.device_of
    dispatch._interpreting = lambda: True  # tensors of the CPU may take the Triton backend
    failures = {}
    with selfnpo_kernels.backend("triton"):
        for what, t in calls():
            for name, op in {"philox_normal": lambda _, t: noise(t), **OPS}.items():
                try:
                    op(selfnpo_kernels, t)
                except Exception as error:
                    failures[f"{name}, {what}"] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    kernels = [{"kernel": name} | resources(cubin, tool) for (name, _), cubin in launches.kernels.items()]
    constants = {
        kernel: {name: sorted(values) for name, values in found.items()} for kernel, found in launches.constants.items()
    }
    return {"launches": launches.count, "failures": failures, "kernels": kernels, "constants": constants}


def table(found: dict) -> str:
    """What `main` found, for people."""
    variants = defaultdict(list)
    for kernel in found["kernels"]:
        variants[kernel["kernel"]].append(kernel)
    lines = [f"{'kernel':26} variants  registers  bytes spilled"]
    for name, kernels in sorted(variants.items()):
        registers = [kernel["registers"] for kernel in kernels]
        spilled = sum(kernel["spilled"] for kernel in kernels)
        lines.append(f"{name:26} {len(kernels):8}  {f'{min(registers)} to {max(registers)}':>9}  {spilled:13}")
    failures = [f"{call}: {error}" for call, error in found["failures"].items()]
    return "\n".join([*lines, f"{found['launches']} launches, {len(failures)} failed", *failures])


if __name__ == "__main__":
    architectures = [argument for argument in sys.argv[1:] if argument != "--json"]
    if len(architectures) != 1 or not architectures[0].isdigit():
        sys.exit(f"error: got {' '.join(architectures) or 'no architecture'}; expected one, for example 90")
    found = main(int(architectures[0]))
    print(json.dumps(found) if "--json" in sys.argv else table(found))
    sys.exit(bool(found["failures"]))
