"""python tests/hub_kernel.py FOLDER: selfnpo_kernels for Hugging Face's kernel-builder (edition 5, torch-noarch).

A kernel of the hub is loaded from any path, in several versions at once. So imports become relative, and the ops get the
namespace that the builder generates as `_ops.py`. Only Python goes there: Triton on GPUs, PyTorch elsewhere. The builder's
extensions register their ops through torch's headers; csrc/ knows no torch, so the C++ and CUDA code stays in the wheel.
"""

import re
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "selfnpo_kernels"
BUILD = """[general]
name = "selfnpo-kernels"
version = 1
edition = 5
license = "Apache-2.0"
backends = ["cpu", "cuda"]

[torch-noarch]
"""
FLAKE = """{
  description = "selfnpo-kernels";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""


def relative(text: str, depth: int) -> str:
    """The source of a module whose imports of selfnpo_kernels start from where it lies, `depth` packages below."""
    here = "." * (depth + 1)
    text = re.sub(r"^( *)import selfnpo_kernels\.(\w+) as \2$", rf"\1from {here} import \2", text, flags=re.MULTILINE)
    text = re.sub(r"^( *from )selfnpo_kernels\.", rf"\1{here}", text, flags=re.MULTILINE)
    return re.sub(r"^( *from )selfnpo_kernels import", rf"\1{here} import", text, flags=re.MULTILINE)


def namespaced(text: str) -> str:
    """registration.py with the builder's namespace in the place of torch.ops.selfnpo."""
    for old, new in (
        ("import torch\n", "import torch\n\nfrom ._ops import add_op_namespace_prefix, ops\n"),
        ('op = f"selfnpo::{name}"', "op = add_op_namespace_prefix(name)"),
        ("getattr(torch.ops.selfnpo, name)", "getattr(ops, name)"),
    ):
        if text.count(old) != 1:
            raise ValueError(f"selfnpo_kernels/registration.py has {old!r} {text.count(old)} times; expected once")
        text = text.replace(old, new)
    return text


def write(folder: Path) -> None:
    package = folder / "torch-ext" / "selfnpo_kernels"
    for path in SOURCE.rglob("*.py"):
        name = path.relative_to(SOURCE)
        text = relative(path.read_text(), len(name.parts) - 1)
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(namespaced(text) if name.name == "registration.py" else text)
    (folder / "build.toml").write_text(BUILD)
    (folder / "flake.nix").write_text(FLAKE)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("error: got no folder; expected python tests/hub_kernel.py FOLDER")
    write(Path(sys.argv[1]))
