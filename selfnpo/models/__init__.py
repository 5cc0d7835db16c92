"""Families of diffusion models behind one interface (family.py), and how they are loaded (source.py, loading.py)."""

from selfnpo.models.demo import DEMO, DEMO_FOLDER
from selfnpo.models.family import Family, SampleOptions
from selfnpo.models.loading import check_negative, load_negative, load_pretrained
from selfnpo.models.origin import ModelOptions
from selfnpo.models.pretrained import Conditions, PretrainedModel
from selfnpo.models.source import FAMILIES, Source

__all__ = [
    "DEMO", "DEMO_FOLDER", "FAMILIES", "Conditions", "Family", "ModelOptions", "PretrainedModel", "SampleOptions", "Source",
    "check_negative", "load_negative", "load_pretrained",
]  # fmt: skip
