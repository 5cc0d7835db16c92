"""Negative models in unmodified diffusers pipelines.

guide.py says what is attached, attachment.py where, calls.py what the negative answers of each call; whole_weights.py and
low_rank.py are the two ways in which two branches share one denoiser.
"""

from selfnpo.guidance.attachment import Guidance
from selfnpo.guidance.guide import guide

__all__ = ["Guidance", "guide"]
