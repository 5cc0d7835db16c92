"""Self-NPO: negative models for classifier-free guidance from a diffusion model's own truncated rollouts."""

from selfnpo.guidance import Guidance, guide

__all__ = ["Guidance", "guide"]
