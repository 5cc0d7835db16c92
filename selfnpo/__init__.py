"""Self-NPO: negative models for classifier-free guidance from a diffusion model's own truncated rollouts."""

import sys
from importlib.abc import MetaPathFinder
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
