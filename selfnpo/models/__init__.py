"""Families of diffusion models behind one interface (family.py), and how they are loaded (source.py, loading.py).

Names are imported on first use, so that source.py can find mistakes in the settings without loading PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfnpo.models.demo import DEMO_FOLDER
    from selfnpo.models.families import FAMILIES
    from selfnpo.models.family import Family
    from selfnpo.models.loading import check_negative, load_negative, load_pretrained
    from selfnpo.models.pretrained import Conditions, PretrainedModel
    from selfnpo.models.source import NOT_THE_DEMO, Source
    from selfnpo.options import DEMO, ModelOptions, SampleOptions

_WHERE = {
    "selfnpo.models.demo": ("DEMO_FOLDER",),
    "selfnpo.models.families": ("FAMILIES",),
    "selfnpo.models.family": ("Family",),
    "selfnpo.models.loading": ("check_negative", "load_negative", "load_pretrained"),
    "selfnpo.models.pretrained": ("Conditions", "PretrainedModel"),
    "selfnpo.models.source": ("NOT_THE_DEMO", "Source"),
    "selfnpo.options": ("DEMO", "ModelOptions", "SampleOptions"),
}

__all__ = [
    "DEMO", "DEMO_FOLDER", "FAMILIES", "NOT_THE_DEMO", "Conditions", "Family", "ModelOptions", "PretrainedModel",
    "SampleOptions", "Source", "check_negative", "load_negative", "load_pretrained",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for module, names in _WHERE.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
