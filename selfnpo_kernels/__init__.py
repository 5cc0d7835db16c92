"""Fused operations between two evaluations of a diffusion model; see `selfnpo_kernels.reference` for their specification."""

from selfnpo_kernels.forward_jump import forward_jump
from selfnpo_kernels.philox import philox_normal, philox_uniform
from selfnpo_kernels.reference import cfg_combine, guided_step, tweedie, x0_loss

__all__ = ["cfg_combine", "forward_jump", "guided_step", "philox_normal", "philox_uniform", "tweedie", "x0_loss"]
