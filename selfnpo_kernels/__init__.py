"""Fused operations for what happens between two evaluations of a diffusion model. They can be used on their own.

`selfnpo_kernels.reference` is their specification. `selfnpo_kernels.dispatch` describes which backend runs where.
"""

from selfnpo_kernels.cfg_combine import cfg_combine
from selfnpo_kernels.dispatch import backend
from selfnpo_kernels.forward_jump import forward_jump
from selfnpo_kernels.fused_adamw import fused_adamw_
from selfnpo_kernels.guided_step import guided_step
from selfnpo_kernels.philox import philox_uniform
from selfnpo_kernels.philox_normal import philox_normal
from selfnpo_kernels.reference import join_weights, split_weights
from selfnpo_kernels.tweedie import tweedie
from selfnpo_kernels.x0_loss import x0_loss

__version__ = "0.2.0"  # also selfnpo's version: pyproject.toml and selfnpo/__init__.py read it from here

__all__ = [
    "backend",
    "cfg_combine",
    "forward_jump",
    "fused_adamw_",
    "guided_step",
    "join_weights",
    "philox_normal",
    "philox_uniform",
    "split_weights",
    "tweedie",
    "x0_loss",
]
