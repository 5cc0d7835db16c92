"""LoRA adapters in a denoiser: add them, find them, switch them on and off."""

import warnings
from collections.abc import Iterable

from diffusers import ModelMixin
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from selfnpo.errors import UserError, first_line

STUDENT, REFERENCE = "student", "reference"  # adapter names


def add_lora(model: ModelMixin, lora: LoraConfig, name: str) -> dict[str, nn.Parameter]:
    """Add float32 adapters to the layers of `model` that `lora` targets, switched off. Returns their parameters.

    Raises:
        UserError: no layer is targeted, or the rank is larger than a layer.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second set is intended
            inject_adapter_in_model(lora, model, name)
    except ValueError as error:
        targets = sorted(lora.target_modules)
        why = first_line(error).partition(". Please")[0]  # the rest is advice for callers of peft
        raise UserError(f"lora_target_modules {targets} match no layers: {why}") from error
    for path, layer in lora_layers(model).items():
        largest = min(len(layer.weight), layer.weight[0].numel())
        if lora.r > largest:
            raise UserError(f"rank is {lora.r}, which is too large for the layer {path}; expected at most {largest}")
        layer.enable_adapters(False)
    found = {path: parameter for path, parameter in model.named_parameters() if f".{name}." in path}
    for parameter in found.values():
        parameter.data = parameter.data.float()
    return found


def lora_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def switch(layers: Iterable[BaseTunerLayer], adapter: str | None) -> None:
    """Switch one set of adapters on, or none, and the others off."""
    for layer in layers:
        if adapter is not None:
            layer.set_adapter(adapter)
        layer.enable_adapters(adapter is not None)
