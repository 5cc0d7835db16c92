"""All model families. The first one that matches a configuration is used."""

from selfnpo.models.class_conditional import ClassConditional
from selfnpo.models.cogvideox import CogVideoX
from selfnpo.models.family import Family
from selfnpo.models.stable_diffusion import StableDiffusion, StableDiffusion2
from selfnpo.models.stable_diffusion_xl import StableDiffusionXL
from selfnpo.models.unconditional import Unconditional

FAMILIES: tuple[Family, ...] = (
    StableDiffusion(),
    StableDiffusion2(),
    StableDiffusionXL(),
    CogVideoX(),
    Unconditional(),
    ClassConditional(),
)
