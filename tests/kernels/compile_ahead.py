"""Compiles every Triton kernel to machine code for GPUs that need not be there; prints what the compiler says as JSON.

Run it without TRITON_INTERPRET: an interpreted kernel cannot be compiled.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from selfnpo_kernels.triton_kernels.blocks import BLOCK
from selfnpo_kernels.triton_kernels.cfg_combine import SEGMENTS, cfg_combine_kernel, moments_kernel
from selfnpo_kernels.triton_kernels.forward_jump import COUNTERS, forward_jump_kernel
from selfnpo_kernels.triton_kernels.guided_step import guided_step_kernel
from selfnpo_kernels.triton_kernels.x0_loss import x0_loss_backward_kernel, x0_loss_kernel

ARCHITECTURES = (80, 90, 100)
# Pointers that have the data's dtype; everything else is typed below.
DATA = {"out", "sample", "cond", "uncond", "prev_sample", "pred_original_sample", "model_output", "target"}
DATA |= {"negative", "positive"}
FLOAT = {"rows", "partials", "grad", "moments", "scale_pointer"}
INT64 = {"sample_ids", "seed_pointer", "step_pointer"}
REAL = {"scale", "rescale", "huber_c", "inverse_count"}
WIDE = {"seed", "step", "elements"}  # compiled in the widest type that they may take

VARIANTS = {
    guided_step_kernel: [
        {"HAS_PREV": prev, "HAS_UNCOND": uncond, "HAS_SCALE_POINTER": pointer, "BLOCK": BLOCK}
        for prev, uncond, pointer in ((False, False, False), (True, False, False), (True, True, False), (True, True, True))
    ],
    forward_jump_kernel: [
        {"HAS_SAMPLE": sample, "HAS_SEED_POINTER": pointers, "HAS_STEP_POINTER": pointers, "CHANNELS_LAST": last,
         "WHOLE": True, "COUNTERS": COUNTERS}
        for sample, pointers, last in ((False, False, False), (True, False, False), (True, True, False), (True, True, True))
    ],
    moments_kernel: [{"HAS_SCALE_POINTER": True, "BLOCK": BLOCK}],
    cfg_combine_kernel: [
        {"HAS_SCALE_POINTER": True, "RESCALE": rescale, "SEGMENTS": SEGMENTS, "BLOCK": BLOCK} for rescale in (False, True)
    ],
    x0_loss_kernel: [{"HUBER": huber, "BLOCK": BLOCK} for huber in (False, True)],
    x0_loss_backward_kernel: [{"HUBER": huber, "OPERAND": 1, "BLOCK": BLOCK} for huber in (False, True)],
}  # fmt: skip


def signature(kernel, dtype: str, constants: dict) -> dict[str, str]:
    def kind(name: str) -> str:
        if name in DATA:
            return f"*{dtype}"
        kinds = {"constexpr": constants, "*fp32": FLOAT, "*i64": INT64, "fp32": REAL, "i64": WIDE}
        return next((kind for kind, names in kinds.items() if name in names), "i32")

    return {name: kind(name) for name in kernel.arg_names}


def compile_ahead(kernel, dtype: str, constants: dict, architecture: int) -> dict:
    """Registers and spilled bytes per thread, as ptxas reports them, and the size of the machine code."""
    names = signature(kernel, dtype, constants)
    # What the launcher finds out at run time on aligned tensors whose samples have a multiple of 16 elements.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(names.items())
        if kind.startswith("*") or name in ("elements", "positions")
    }
    source = ASTSource(kernel, names, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4})
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        gpu = re.search(r"[.]target (sm_[0-9a-z]+)", ptx)[1]
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={gpu}", path, "-o", path.with_suffix(".cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True)
    return {
        "kernel": kernel.__name__,
        "dtype": dtype,
        "variant": constants,
        "architecture": architecture,
        "registers": int(re.search(r"Used (\d+) registers", report.stderr)[1]),
        "spilled": sum(int(size) for size in re.findall(r"(\d+) bytes spill", report.stderr)),
        "spills_reported": len(re.findall(r"bytes spill", report.stderr)),
        "cubin": len(compiled.asm["cubin"]),
    }


if __name__ == "__main__":
    rows = [
        compile_ahead(kernel, dtype, constants, architecture)
        for kernel, variants in VARIANTS.items()
        for constants in variants
        for dtype in ("fp32", "bf16")
        for architecture in ARCHITECTURES
    ]
    print(json.dumps(rows))
