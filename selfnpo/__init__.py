"""Self-NPO: negative models for classifier-free guidance from a diffusion model's own truncated rollouts."""

import re
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfnpo.guidance import Guidance, guide

__all__ = ["Guidance", "guide"]

_MOVED = {  # modules that used to be here, by their current package
    "training": "attention capture checkpoint feasible joint objective optimizer rollout snapshot state step student tandem "
    "trainer validation",
    "inputs": "data images prompts",
    "sampling": "decode picture sweep video",
    "export": "hub model_card results",
    "budget": "memory meter",
    "models.lora": "adapters lora_files",
    "demo": "world",
}


def __getattr__(name: str) -> Any:
    """Import diffusers only when guidance is asked for, so that commands start fast."""
    if name == "__version__":  # read as text, because importing selfnpo_kernels would import torch
        source = (Path(__file__).parents[1] / "selfnpo_kernels" / "__init__.py").read_text(encoding="utf-8")
        return re.findall(r'^__version__ = "(.+)"', source, re.MULTILINE)[0]
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from selfnpo import guidance

    return getattr(guidance, name)


class _Moved(MetaPathFinder):
    """The last import finder to be asked: says where a module has moved."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        old = name.removeprefix("selfnpo.").split(".")[0] if name.startswith("selfnpo.") else ""
        for package, modules in _MOVED.items():
            if old in modules.split():
                raise ImportError(f"{name} has moved into selfnpo.{package}; see docs/architecture.md", name=name)


sys.meta_path.append(_Moved())
