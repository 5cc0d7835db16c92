"""Negative models in unmodified diffusers pipelines.

guide.py is the entry point, attachment.py hooks into the denoiser, and calls.py finds the part of each call that belongs to
the negative. whole_weights.py and low_rank.py are the two ways in which both branches share one denoiser.
"""

from selfnpo.guidance.attachment import Guidance
from selfnpo.guidance.guide import guide

__all__ = ["Guidance", "guide"]
