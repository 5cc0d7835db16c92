"""Self-NPO: negative models for classifier-free guidance from a diffusion model's own truncated rollouts."""

import re
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfnpo.guidance import Guidance, guide

__all__ = ["Guidance", "guide"]

_MOVED = {  # modules that lay here once, by the package that has them now
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
    """Imports diffusers for those who ask for it, and not for every command."""
    if name == "__version__":  # read, because importing selfnpo_kernels would import torch
        source = (Path(__file__).parents[1] / "selfnpo_kernels" / "__init__.py").read_text(encoding="utf-8")
        return re.findall(r'^__version__ = "(.+)"', source, re.MULTILINE)[0]
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from selfnpo import guidance

    return getattr(guidance, name)


class _Moved(MetaPathFinder):
    """Asked last: says where a module has gone."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        old = name.removeprefix("selfnpo.").split(".")[0] if name.startswith("selfnpo.") else ""
        for package, modules in _MOVED.items():
            if old in modules.split():
                raise ImportError(f"{name} has moved into selfnpo.{package}; see docs/architecture.md", name=name)


sys.meta_path.append(_Moved())
