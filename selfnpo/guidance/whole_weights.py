"""Branches that differ in all weights take turns: the denoiser itself runs, with the branch's parameters in its layers.

So whatever else a user has added to it (LoRAs, IP-Adapters, attention processors, offloading, compiled blocks) acts on both
branches, and one compiled graph serves both. Two half batches cost the same as one full batch.
"""

from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from selfnpo.errors import UserError
from selfnpo.guidance.branches import Branches, Forward, Part, base_layers, check_projections, offload_hook

# Shared by all samples, whatever the size of their first dimension.
NOT_BATCHED = {"image_rotary_emb", "ofs", "ip_adapter_masks"}
# These may have several rows per sample, one per frame.
CONDITIONS = {"encoder_hidden_states", "image_embeds"}


class Place(NamedTuple):
    """Where a weight belongs."""

    layer: nn.Module
    name: str  # in the layer
    key: str  # in the denoiser
    hook: Any  # accelerate's, if it loads the layer's offloaded weights for every call


class WholeWeights(Branches):
    """Two sets of weights. The positive branch uses the denoiser's own unless `positive` is given.

    Args:
        negative, positive: weights by their names in the denoiser. They are moved to its device and dtype.
    """

    def __init__(self, denoiser: ModelMixin, negative: Mapping[str, Tensor], positive: Mapping[str, Tensor] | None):
        self.denoiser = denoiser
        # New parameters, so that a model passed in stays unchanged.
        self.negative, self.positive = (
            {name: nn.Parameter(weight.detach(), requires_grad=False) for name, weight in (weights or {}).items()}
            for weights in (negative, positive)
        )
        self.places: list[Place] = []

    def attach(self) -> None:
        """Nothing to do: layers are changed only while `evaluate` runs."""

    def detach(self) -> None:
        """Nothing to do."""

    def tensors(self) -> Iterator[Tensor]:
        yield from self.negative.values()
        yield from self.positive.values()

    def prepare(self, sample: Tensor) -> None:
        if getattr(self.denoiser, "is_cache_enabled", False):
            raise UserError("the denoiser's cache would mix up the two branches; call disable_cache() on the denoiser")
        check_projections(self.denoiser)
        self.places.clear()
        for path, layer in base_layers(self.denoiser):
            hook = offload_hook(layer)
            for name, own in layer.named_parameters(recurse=False):
                key = f"{path}.{name}" if path else name
                if key not in self.negative:
                    continue
                self.places.append(Place(layer, name, key, hook))
                for weights in (self.negative, self.positive):
                    if key in weights:
                        _match(weights[key], own, torch.device("cpu") if hook else sample.device)
        if len(self.places) < len(self.negative):
            missing = self.negative.keys() - {place.key for place in self.places}
            raise UserError(f"the denoiser has lost {min(missing)} since guide() was called; detach and guide again")
        for path, layer in self.denoiser.named_modules():
            if isinstance(layer, BaseTunerLayer) and layer.merged:
                raise UserError(
                    f"a LoRA is fused into {path}, but not into the negative's weights; call pipe.unfuse_lora() so that "
                    "both branches use it"
                )

    def evaluate(self, forward: Forward, arguments: dict[str, Any], part: Part) -> Any:
        if part in ("none", "all"):
            with self._in_place(self.negative if part == "all" else self.positive):
                return forward(**arguments)
        size = len(next(iter(arguments.values())))
        in_turn = (self.negative, self.positive) if part == "first" else (self.positive, self.negative)
        outputs = []
        for half, weights in enumerate(in_turn):
            with self._in_place(weights):
                outputs.append(forward(**{name: _half(name, value, half, size) for name, value in arguments.items()}))
        return _join(outputs)

    @contextmanager
    def _in_place(self, weights: dict[str, nn.Parameter]) -> Iterator[None]:
        """Put `weights` into the denoiser's layers for a while; without any, the denoiser's own stay."""
        if not weights:
            yield
            return
        own = [place.hook.weights_map if place.hook else place.layer._parameters[place.name] for place in self.places]
        try:
            for place in self.places:
                if place.hook:
                    place.hook.weights_map = ChainMap({place.name: weights[place.key]}, place.hook.weights_map)
                else:
                    place.layer._parameters[place.name] = weights[place.key]
            yield
        finally:
            for place, before in zip(self.places, own, strict=True):
                if place.hook:
                    place.hook.weights_map = before
                else:
                    place.layer._parameters[place.name] = before


def _match(weight: nn.Parameter, own: Tensor, device: torch.device) -> None:
    """Give `weight` every property of `own` that compiled code checks, so that it accepts both."""
    data = weight.data.to(device, own.dtype)
    if data.stride() != own.stride():
        data = torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device=device).copy_(data)
    weight.data = data
    weight.requires_grad_(own.requires_grad)


def _half(name: str, value: Any, half: int, size: int) -> Any:
    """The first or second half of an argument. Containers are copied, because a denoiser may modify its lists.

    Args:
        size: samples in the whole batch.
    """
    if isinstance(value, Tensor):
        rows = len(value) if value.ndim else 0
        is_batched = (rows == size and name not in NOT_BATCHED) or (rows > 0 and rows % size == 0 and name in CONDITIONS)
        return value.chunk(2)[half] if is_batched else value
    if isinstance(value, dict):
        return {key: _half(key, each, half, size) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_half(name, each, half, size) for each in value)
    return value


def _join(outputs: list[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if isinstance(first, dict):  # diffusers' BaseOutput
        return type(first)(**{key: _join([output[key] for output in outputs]) for key in first})
    if isinstance(first, tuple):
        return tuple(_join([*each]) for each in zip(*outputs, strict=True))
    return first
