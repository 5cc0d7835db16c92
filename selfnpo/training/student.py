"""The student that is trained and the reference that teaches it. How much they share decides how much memory they need.

    form        student                          reference, frozen             reference, averaged
    full        its own copy of all weights      a copy in training precision  a copy that follows the student
    low rank    adapters on the base's weights   the base, adapters off        a second set of adapters

Trained and averaged weights have float32 precision: in bfloat16 neither would move, because a step is smaller than the
resolution of bfloat16. If the network computes in bfloat16, such a weight is stored in two halves: the nearest bfloat16,
which the network uses, and an int16 remainder, in `low_halves`. If it computes in float16, the weight is stored in float32,
and autocast rounds it at every use. Averaging adapters averages their factors.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property

import torch
from diffusers import ModelMixin
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from selfnpo.config import TrainConfig
from selfnpo.errors import UserError
from selfnpo.models import Family, PretrainedModel
from selfnpo.models.lora.adapters import REFERENCE, STUDENT, add_lora, lora_layers, switch
from selfnpo.training.attention import use_xformers
from selfnpo_kernels.reference import join_weights, split_weights

RECOMPILE_LIMIT = 128  # enough for all shapes of a model's blocks, with and without gradients


class Student(ABC):
    """The model that is trained, and its reference."""

    base: PretrainedModel
    theta: list[Tensor]  # the base's weights
    model: nn.Module  # computes the student's output
    reference: nn.Module
    trainable: dict[str, nn.Parameter]
    low_halves: dict[str, Tensor]  # of `trainable`; empty if those are float32
    averaged: dict[str, Tensor]  # the reference's own weights, under the student's names; empty if it is frozen
    averaged_low_halves: dict[str, Tensor]
    is_averaged_here: bool  # on the student's device and in its layout, so that one pass updates both

    @abstractmethod
    def networks(self) -> list[ModelMixin]:
        """The models behind student and reference, without duplicates."""

    @abstractmethod
    def positive(self) -> AbstractContextManager[ModelMixin]:
        """The base, on the device while the context lasts."""

    @abstractmethod
    def training(self) -> AbstractContextManager:
        """A context for the student's forward and backward pass."""

    @abstractmethod
    def merged(self) -> ModelMixin:
        """theta + delta as a separate model."""

    @abstractmethod
    def _delta_norm(self) -> Tensor: ...

    def relative_delta(self) -> float:
        """||delta|| / ||theta||: how far the student has moved from the base, as a share of its weights."""
        return (self._delta_norm() / self._theta_norm).item()

    @cached_property
    def _theta_norm(self) -> Tensor:
        return torch.stack([_norm(self._here(theta)) for theta in self.theta]).norm()

    def _here(self, theta: Tensor) -> Tensor:
        return theta.to(self.base.device, non_blocking=True)

    def masters(self) -> dict[str, Tensor]:
        """The trained weights in float32."""
        own = {name: weight.detach() for name, weight in self.trainable.items()}
        return {name: join_weights(own[name], low) for name, low in self.low_halves.items()} or own

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """One step of the reference's moving average, for when the optimizer does not do it."""
        if self.averaged:
            averaged = [*self.averaged.values()]
            now = [weight.to(old.device) for weight, old in zip(self.masters().values(), averaged, strict=True)]
            torch._foreach_lerp_(averaged, now, 1 - decay)

    def compile(self, static: bool) -> None:
        """Compile the repeated blocks of the networks one by one, in a fraction of the time of compiling all at once.

        What is between the blocks only costs launches, and a captured graph has none. Compiling everything would also be
        wrong: on a CPU, torch 2.13's Inductor loses the gradient of a UNet's upsampling.

        Args:
            static: whether all batches have the same size.
        """
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        for network in self.networks():
            for module in network.modules():
                if type(module).__name__ in self.base.family.repeated_blocks:
                    module.compile(dynamic=False if static else None)


def is_split(config: TrainConfig, dtype: torch.dtype) -> bool:
    """Whether trained weights are stored in two halves."""
    return dtype == torch.bfloat16 and not config.use_8bit_adam


def split_(weights: dict[str, nn.Parameter], values: Iterable[Tensor]) -> dict[str, Tensor]:
    """Set `weights` to the bfloat16 halves of float32 `values`. Returns the low halves."""
    low_halves = {}
    for (name, weight), value in zip(weights.items(), values, strict=True):
        weight.data, low_halves[name] = split_weights(value.detach().to(weight.device, torch.float32))
    return low_halves


def make_student(config: TrainConfig, base: PretrainedModel) -> Student:
    """A student that starts as a copy of the base.

    Raises:
        UserError: models of this family do not support a setting.
    """
    if config.attention == "xformers":
        use_xformers(base)
    if config.compile:
        base.denoiser.to(memory_format=torch.channels_last)  # a layout that Inductor keeps through normalisations
    return LoRAStudent(config, base) if config.rank else FullStudent(config, base)


def checkpoint_gradients(config: TrainConfig, model: ModelMixin) -> None:
    if not (config.gradient_checkpointing or config.low_vram):
        return
    if model._supports_gradient_checkpointing:
        model.enable_gradient_checkpointing()
    elif config.gradient_checkpointing:
        raise UserError(f"gradient_checkpointing is on, but diffusers has none for {type(model).__name__}; leave it out")


class FullStudent(Student):
    """All weights are trained. The base stays unchanged; if a GPU trains, it is kept in pinned host memory."""

    def __init__(self, config: TrainConfig, base: PretrainedModel):
        self.base, theta = base, base.denoiser
        self.theta = [*theta.parameters()]
        here = next(theta.parameters()).device == base.device
        if not here:
            for parameter in self.theta:
                parameter.data = parameter.data.pin_memory()
        split, is_averaged = is_split(config, base.dtype), config.reference_decay < 1
        offloaded = config.low_vram and base.device.type == "cuda"
        self.is_averaged_here = is_averaged and not offloaded
        self.model = converted(theta, base.device, torch.bfloat16 if split else torch.float32).requires_grad_(True)
        checkpoint_gradients(config, self.model)
        self.trainable = dict(self.model.named_parameters())
        self.low_halves = split_(self.trainable, self.theta) if split else {}
        own_halves = split and self.is_averaged_here
        dtype = torch.float32 if is_averaged and not own_halves else base.dtype
        reference = theta if here and not is_averaged and theta.dtype == dtype else converted(theta, base.device, dtype)
        self.averaged = dict(reference.named_parameters()) if is_averaged else {}
        self.averaged_low_halves = split_(self.averaged, self.theta) if own_halves else {}
        if offloaded:
            reference.to("cpu")
            reference.enable_group_offload(onload_device=base.device, offload_type="leaf_level")
        self.reference = reference

    def networks(self) -> list[ModelMixin]:
        return [self.model, self.reference]

    @contextmanager
    def positive(self) -> Iterator[ModelMixin]:
        base = self.base.denoiser
        here = next(base.parameters()).device == self.base.device
        yield base if here else converted(base, self.base.device, self.base.dtype)

    def training(self) -> AbstractContextManager:
        return nullcontext()

    def _delta_norm(self) -> Tensor:
        # One tensor at a time, so that a base on the host takes no more device memory than its largest tensor. Everything is
        # queued on one stream: a second one could only hide the norms, which take a tenth of the time of the copies.
        low_halves = self.low_halves
        delta = [
            _norm((join_weights(now, low_halves[name]) if low_halves else now) - self._here(theta))
            for (name, now), theta in zip(self.trainable.items(), self.theta, strict=True)
        ]
        return torch.stack(delta).norm()

    def merged(self) -> ModelMixin:
        if not self.low_halves:
            return self.model
        model = converted(self.model, torch.device("cpu"), torch.float32)
        for parameter, master in zip(model.parameters(), self.masters().values(), strict=True):
            parameter.data.copy_(master)
        return model


def lora_config(config: TrainConfig, family: Family) -> LoraConfig:
    targets = list(config.lora_target_modules or family.lora_targets)
    return LoraConfig(r=config.rank, lora_alpha=config.lora_alpha or config.rank, target_modules=targets)


class LoRAStudent(Student):
    """LoRA adapters are trained. They are attached to the base itself, so it exists only once. They are off by default."""

    def __init__(self, config: TrainConfig, base: PretrainedModel):
        self.base, self.weights, self.lora = base, base.denoiser, lora_config(config, base.family)
        self.theta = [*self.weights.parameters()]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.trainable = add_lora(self.weights, self.lora, STUDENT)
            self.averaged = {}
            if config.reference_decay < 1:
                added = add_lora(self.weights, self.lora, REFERENCE)
                self.averaged = dict(zip(self.trainable, added.values(), strict=True))
        for path, parameter in self.averaged.items():
            parameter.data.copy_(self.trainable[path].data)
        self.low_halves, self.averaged_low_halves, self.is_averaged_here = {}, {}, bool(self.averaged)
        if is_split(config, base.dtype):
            self.low_halves, self.averaged_low_halves = (
                split_(own, own.values()) for own in (self.trainable, self.averaged)
            )
        checkpoint_gradients(config, self.weights)
        self.layers = lora_layers(self.weights)
        self.active: str | None = None
        self.model = _Adapted(self, STUDENT)
        self.reference = _Adapted(self, REFERENCE if self.averaged else None)

    def networks(self) -> list[ModelMixin]:
        return [self.weights]

    def positive(self) -> AbstractContextManager[ModelMixin]:
        return nullcontext(self.weights)

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        before = self.active
        self._switch(adapter)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, adapter: str | None) -> None:
        if adapter != self.active:
            switch(self.layers.values(), adapter)
            self.active = adapter

    def training(self) -> AbstractContextManager:
        return self.using(STUDENT)  # a checkpointed layer runs again in the backward pass

    def _delta_norm(self) -> Tensor:
        squares, weights = [], self.masters()
        for path, layer in self.layers.items():
            down, up = (weights[f"{path}.lora_{factor}.{STUDENT}.weight"].flatten(1) for factor in "AB")
            # ||B A||^2 = tr((B^T B) (A A^T)) avoids the product B A, which is as large as the layer.
            squares.append(layer.scaling[STUDENT] ** 2 * ((up.T @ up) * (down @ down.T)).sum())
        return torch.stack(squares).sum().clamp(min=0).sqrt()

    def state_dict(self) -> dict[str, Tensor]:
        """The adapters under peft's names."""
        return get_peft_model_state_dict(self.weights, self.masters(), adapter_name=STUDENT)

    def merged(self) -> ModelMixin:
        model = converted(self.weights, torch.device("cpu"), torch.float32)
        own = dict(model.named_parameters())
        for path, master in self.masters().items():
            own[path].data.copy_(master)
        for layer in lora_layers(model).values():
            layer.enable_adapters(True)
            layer.merge(adapter_names=[STUDENT])
        recurse_remove_peft_layers(model)
        del model.peft_config
        return model.requires_grad_(False)


class _Adapted(nn.Module):
    """A denoiser with one set of adapters switched on."""

    def __init__(self, student: LoRAStudent, adapter: str | None):
        super().__init__()
        self._student, self._adapter = (student,), adapter  # in a tuple, so that it does not become a submodule

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its adapters, or of the weights if it has none."""
        (student,) = self._student
        own = {STUDENT: student.trainable, REFERENCE: student.averaged}.get(self._adapter)
        return next(iter(own.values())).dtype if own else student.weights.dtype

    def forward(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor]:
        (student,) = self._student
        with student.using(self._adapter):
            return student.weights(*args, **kwargs)


def converted(model: ModelMixin, device: torch.device, dtype: torch.dtype) -> ModelMixin:
    """A converted copy, made tensor by tensor: an intermediate copy of the whole model might not fit in memory."""

    def copied(tensor: Tensor) -> Tensor:
        moved = tensor.detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved

    return copy.deepcopy(model, {id(tensor): copied(tensor) for tensor in (*model.parameters(), *model.buffers())})


def _norm(tensor: Tensor) -> Tensor:
    return tensor.detach().float().norm()
