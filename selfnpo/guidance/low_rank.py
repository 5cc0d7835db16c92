"""Branches that differ by low-rank offsets run together: one pass over the shared weights, in which each layer adds the
offset of a branch to the rows of that branch."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.nn import functional

from selfnpo.guidance.branches import Branches, Forward, Part, base_layers, check_projections
from selfnpo.models.lora.read import Offset

Shares = list[tuple[Mapping[str, Offset], float]]
"""(offsets by layer path, share of them)."""


class LowRank(Branches):
    """Low-rank offsets to the denoiser's weights, for both branches."""

    def __init__(self, denoiser: ModelMixin, negative: Shares, positive: Shares):
        self.denoiser = denoiser
        self.part: Part = "none"
        self.offsets = {
            path: (_factors(path, negative), _factors(path, positive))
            for offsets, _ in (*negative, *positive)
            for path in offsets
        }
        self.layers: list[nn.Module] = []

    def attach(self) -> None:
        layers = dict(base_layers(self.denoiser))
        for path, (negative, positive) in self.offsets.items():
            layer = layers[path]
            layer.branches = self
            layer.low_rank = negative, positive
            layer.__class__ = _class_with_offset(type(layer))
            self.layers.append(layer)

    def detach(self) -> None:
        for layer in self.layers:
            layer.__class__ = type(layer).__bases__[1]
            del layer.branches, layer.low_rank
        self.layers.clear()

    def tensors(self) -> Iterator[Tensor]:
        for both in self.offsets.values():
            for factors in both:
                yield from factors or ()

    def prepare(self, sample: Tensor) -> None:
        for tensor in self.tensors():
            tensor.data = tensor.data.to(sample.device, sample.dtype)
        check_projections(self.denoiser)

    def evaluate(self, forward: Forward, arguments: dict[str, Any], part: Part) -> Any:
        self.part = part
        try:
            return forward(**arguments)
        finally:
            self.part = "none"


def _factors(path: str, changes: Shares) -> tuple[Tensor, Tensor] | None:
    """(down, up) of the sum of a layer's offsets, `[rank, inputs, ...]` and `[outputs, rank, ...]`; None if it has none."""
    found = [(offsets[path], share) for offsets, share in changes if path in offsets and share]
    if not found:
        return None
    down = torch.cat([offset.down for offset, _ in found])
    return down, torch.cat([offset.up.float() * offset.scale * share for offset, share in found], dim=1).to(down.dtype)


class _WithOffset:
    """Mixed in before a layer's class. A subclass rather than a forward hook, because compiled code notices it and it works
    with accelerate's and diffusers' hooks, which replace `forward`."""

    branches: LowRank | None = None  # None for layers that peft creates from the class of one with offsets

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # the name that `forward` uses
        output = super().__call__(input, *args, **kwargs)
        if self.branches is None:
            return output
        part, half = self.branches.part, len(input) // 2
        negative, positive = self.low_rank
        if part in ("first", "second"):
            first, second = (negative, positive) if part == "first" else (positive, negative)
            self.add(first, input[:half], output[:half])
            self.add(second, input[half:], output[half:])
        else:
            self.add(negative if part == "all" else positive, input, output)
        return output

    def add(self, factors: tuple[Tensor, Tensor] | None, x: Tensor, output: Tensor) -> None:
        if factors is None:
            return
        down, up = factors
        if isinstance(self, nn.Conv2d):
            output += functional.conv2d(self._conv_forward(x, down, None), up)
        else:
            output += functional.linear(functional.linear(x, down), up)


@cache
def _class_with_offset(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of the same name, cached so that compiled code recognises it."""
    return type(kind.__name__, (_WithOffset, kind), {})
