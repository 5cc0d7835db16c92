"""Self-NPO: negative models for classifier-free guidance from a diffusion model's own truncated rollouts."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfnpo.guidance import Guidance, guide

__all__ = ["Guidance", "guide"]


def __getattr__(name: str) -> Any:
    """Imports diffusers for those who ask for it, and not for every command."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from selfnpo import guidance

    return getattr(guidance, name)
