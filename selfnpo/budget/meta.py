"""Models on the meta device: shapes without values, for counting."""

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from selfnpo.config import TrainConfig
from selfnpo.models import SampleOptions, Source
from selfnpo.models.lora.adapters import STUDENT, add_lora, lora_layers, switch
from selfnpo.training.attention import AttentionCalls
from selfnpo.training.student import checkpoint_gradients, lora_config


def make_trainable(config: TrainConfig, source: Source, model: ModelMixin) -> list[nn.Parameter]:
    """Turn a model on the meta device into the student for `config`, and return the trained parameters.

    Raises:
        UserError: a LoRA does not fit the model's layers.
    """
    if config.rank:
        trainable = [*add_lora(model, lora_config(config, source.family), STUDENT).values()]
        switch(lora_layers(model).values(), STUDENT)
    else:
        trainable = [*model.requires_grad_(True).parameters()]
    checkpoint_gradients(config, model)
    return trainable


def activations(config: TrainConfig, source: Source, model: ModelMixin, shape: tuple[int, ...]) -> int:
    """Bytes that one forward pass of `model`, on the meta device, keeps for its backward pass."""
    kept: dict[int, int] = {}
    weights = {id(parameter) for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in weights and id(tensor._base) not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    alive: list[Tensor] = []  # keeps tensors alive, so that no address is used twice
    with (
        AttentionCalls(lambda query, key, value, *_, **options: _Flash.apply(query, key, value)),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        call_on_meta(source, model, shape, config.train_batch_size, config)
    return sum(kept.values())


def call_on_meta(source: Source, model: ModelMixin, shape: tuple[int, ...], batch_size: int, sizes: SampleOptions) -> Tensor:
    """Call the model on the meta device, with a batch of samples and conditions of the right shapes."""
    family, config = source.family, source.config

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=model.dtype, device="meta")

    conditions = {name: empty(batch_size, *row) for name, row in family.condition_shapes(config).items()}
    conditions |= {name: rows[:1].expand(batch_size).to("meta") for name, rows in family.classes(config).items()}
    for name, value in family.constants(config, shape, source.scale, sizes).items():
        is_tensor = isinstance(value, Tensor)
        conditions[name] = value.expand(batch_size, -1).to("meta") if is_tensor else tuple(each.to("meta") for each in value)
    return family.call(model, empty(batch_size, *shape), torch.zeros(batch_size, device="meta"), conditions)


class _Flash(torch.autograd.Function):
    """Attention that keeps its inputs and its output for the backward pass, but not the attention matrix."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output
