"""Load a model from a source on disk or on the hub."""

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from selfnpo.device import default_device
from selfnpo.errors import UserError
from selfnpo.models.lora.read import is_lora, merge_lora, read_lora
from selfnpo.models.origin import refuse_unsafe
from selfnpo.models.pretrained import Conditions, PretrainedModel
from selfnpo.models.source import Source
from selfnpo.options import ModelOptions, SampleOptions
from selfnpo.progress import progress

ENCODE_BATCH = 16
SHARE_OF_DEVICE = 0.1  # of its free memory, for encoded prompts; larger ones are streamed from the host


def load_pretrained(
    options: ModelOptions | None = None,
    sizes: SampleOptions | None = None,
    prompts: Sequence[str] = ("",),
    further_prompts: Sequence[str] = (),
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    weights_device: torch.device | None = None,
    weights_dtype: torch.dtype = torch.float32,
    stream_conditions: bool = False,
) -> PretrainedModel:
    """Load a pretrained model, by default the embedded demo. Text encoders are loaded, used once and freed before the
    denoiser is loaded.

    Args:
        prompts: the training prompts, for families with prompts.
        further_prompts: conditions for pictures, placed after the null condition; class numbers for families with classes.
        device: for samples and computation; by default a GPU if there is one.
        dtype: precision of the network's computation.
        weights_device, weights_dtype: for the denoiser's weights; by default `device` and float32.
        stream_conditions: keep the conditions in pinned memory on the host instead of on the device.

    Raises:
        UserError: a part is missing, unreachable, corrupt or of the wrong type, or the size is not supported.
    """
    source, sizes, device = Source(options or ModelOptions()), sizes or SampleOptions(), device or default_device()
    source.check_vae()
    sample_shape = source.family.sample_shape(source.config, source.scale, sizes)
    scheduler = source.scheduler
    conditions = _conditions(source, sample_shape, sizes, prompts, further_prompts, device, dtype, stream_conditions)
    denoiser = source.denoiser(weights_dtype).to(weights_device or device)
    padding = source.family.padding(source.config, sizes)
    return PretrainedModel(source.family, denoiser, scheduler, conditions, sample_shape, device, dtype, source, padding)


def check_negative(name_or_path: str | Path, source: Source) -> None:
    """Find mistakes in a negative or positive before anything else is loaded. Of a denoiser this reads the configuration and
    headers. A LoRA is small, so it is read completely. Weights on the hub are not downloaded.

    Raises:
        UserError: it is missing or corrupt, or has a different architecture.
    """
    name, family = str(name_or_path), source.family
    options = replace(source.options, lora_name_or_path=name, revision=None)
    refuse_unsafe(name)
    if is_lora(name, options):
        read_lora(source.empty_denoiser(), family.pipeline_class, family.component, options)
    else:
        source.check_replacement(name)


def load_negative(name_or_path: str | Path, base: PretrainedModel) -> ModelMixin:
    """Load a trained negative from a folder, hub id or file, in float32 on the base's device: a denoiser with the base's
    architecture, or a LoRA, which is merged into the base.

    Raises:
        UserError: it is missing or corrupt, or has a different architecture.
    """
    name, source, dtype = str(name_or_path), base.source, torch.float32
    options = replace(source.options, lora_name_or_path=name, lora_scale=1.0, revision=None)
    if is_lora(name, options):
        negative = source.denoiser(dtype)  # includes the base's own LoRA, on top of which this one was trained
        merge_lora(negative, source.family.pipeline_class, source.family.component, options, dtype)
    else:
        negative = source.replacement(name, dtype)
    return negative.to(next(base.denoiser.parameters()).device)


def _conditions(
    source: Source,
    sample_shape: tuple[int, ...],
    sizes: SampleOptions,
    prompts: Sequence[str],
    further: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    stream: bool,
) -> Conditions:
    family = source.family
    if family.takes_prompts:
        count, rows = len(prompts), _encode(source, prompts, further, device, dtype)
        gc.collect()  # pipelines are reference cycles, and text encoders may be larger than the denoiser
        if device.type == "cuda":
            torch.cuda.empty_cache()
    else:
        if tuple(prompts) != ("",):
            raise UserError(
                f"prompts were given, but {source.name} is a {family.name} model without prompts; leave them out"
            )
        classes = family.classes(source.config)
        count = len(next(iter(classes.values()))) - 1 if classes else 1
        index = torch.tensor([*range(count + 1), *(_class_number(text, count, bool(classes)) for text in further)])
        rows = {name: tensor[index] for name, tensor in classes.items()}
    size = sum(tensor.nbytes for tensor in rows.values())
    if device.type == "cuda":
        stream = stream or size > SHARE_OF_DEVICE * torch.cuda.mem_get_info(device)[0]
        rows = {name: tensor.pin_memory() if stream else tensor.to(device) for name, tensor in rows.items()}
    constants = family.constants(source.config, sample_shape, source.scale, sizes)
    return Conditions(count, rows, {name: _on(value, device) for name, value in constants.items()})


def _on(value: Tensor | tuple[Tensor, ...], device: torch.device) -> Tensor | tuple[Tensor, ...]:
    return value.to(device) if isinstance(value, Tensor) else tuple(tensor.to(device) for tensor in value)


def _class_number(text: str, count: int, labelled: bool) -> int:
    if not labelled:
        raise UserError(f"the prompt for pictures is {text!r}, but the model is unconditional; leave it out")
    if not text.isdecimal() or int(text) >= count:
        raise UserError(f"the prompt for pictures is {text!r}; expected a class number from 0 to {count - 1} for this model")
    return int(text)


@torch.no_grad()
def _encode(
    source: Source, prompts: Sequence[str], further: Sequence[str], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Encode all prompts into rows on the CPU: the training prompts, the null condition, the further prompts."""
    family = source.family
    pipeline = source.pipeline(family.text_components, dtype)
    for name in family.text_components:
        if name.startswith("tokenizer"):
            tokenizer = getattr(pipeline, name)
            limit = family.max_tokens(tokenizer, source.config)
            given = [*filter(None, (*prompts, *further))]
            if cut := too_long(given, tokenizer, limit):
                print(f"warning: {cut} of {len(given)} prompts are longer than the {limit} tokens of {name}; cut")
    pipeline.to(device)
    found: list[dict[str, Tensor]] = []
    with progress(total=len(prompts) + 1 + len(further), desc="encode prompts", unit="prompt") as bar:
        for group, is_null in ((prompts, False), ([""], True), (further, False)):
            for start in range(0, len(group), ENCODE_BATCH):
                batch = group[start : start + ENCODE_BATCH]
                rows = (
                    family.encode_null(pipeline, source.config) if is_null else family.encode(pipeline, source.config, batch)
                )
                found.append({name: tensor.to("cpu", dtype) for name, tensor in rows.items()})
                bar.update(len(batch))
    rows = {name: torch.cat([rows[name] for rows in found]) for name in found[0]}
    for name, shape in family.condition_shapes(source.config).items():
        if rows[name].shape[1:] != shape:
            got = list(rows[name].shape[1:])
            raise UserError(
                f"the text encoder of {source.name} returns {name} of shape {got}, but the denoiser expects {list(shape)}"
            )
    return rows


def too_long(prompts: Sequence[str], tokenizer: Any, max_length: int) -> int:
    """The number of prompts with more than `max_length` tokens, including special ones."""
    if not prompts:
        return 0  # tokenizers reject an empty list
    return sum(len(ids) > max_length for ids in tokenizer(list(prompts), truncation=False, verbose=False).input_ids)
