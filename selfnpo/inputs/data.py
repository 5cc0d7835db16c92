"""What a run trains on: the base, prompts, and encoded images if rollouts start from data."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from selfnpo.config import TrainConfig, check_data
from selfnpo.device import dtype_of
from selfnpo.errors import UserError
from selfnpo.inputs.folder import read_folder
from selfnpo.inputs.images import encode_images
from selfnpo.inputs.prompts import read_prompts
from selfnpo.models import PretrainedModel, Source, load_pretrained


@dataclass(frozen=True)
class TrainData:
    prompts: list[str]  # without duplicates
    files: list[Path]  # images; empty if rollouts start from noise
    captions: list[str]  # one per image


def read_data(config: TrainConfig, source: Source) -> TrainData:
    """The prompts and image files that the settings ask for.

    Raises:
        UserError: they cannot be read, or do not fit the model.
    """
    check_data(config)
    if config.train_data_dir is None:
        prompts = read_prompts(config.prompts, config.prompt_dataset, config.local_files_only)
        return TrainData(_needed(prompts, config), [], [])
    files, captions = read_folder(config.train_data_dir)
    return TrainData([*dict.fromkeys(captions)] if source.family.takes_prompts else [""], files, captions)


def _needed(prompts: list[str], config: TrainConfig) -> list[str]:
    """The prompts to encode. If there are more than the run starts trajectories, evenly spaced ones are picked."""
    started = config.max_train_steps * config.total_batch_size
    if config.rollout == "pool":  # a trajectory lasts N steps, and every slot of the pool starts with one
        started = config.pool_size * config.total_batch_size + -(-started // config.num_inference_steps)
    if len(prompts) <= started:
        return prompts
    print(f"note: only {started:,} of the {len(prompts):,} prompts are used: the run starts no more trajectories")
    return [prompts[index * len(prompts) // started] for index in range(started)]


def load_base(config: TrainConfig, data: TrainData) -> PretrainedModel:
    """The base, placed for training: on the device if a LoRA shares its weights, on the host for full training."""
    lora, dtype = config.rank > 0, dtype_of(config.mixed_precision)
    return load_pretrained(
        config,
        config,
        data.prompts,
        config.validation_prompt,
        dtype=dtype,
        weights_device=None if lora else torch.device("cpu"),
        weights_dtype=dtype if lora else torch.float32,
        stream_conditions=config.low_vram,
    )


def encode_data(data: TrainData, base: PretrainedModel) -> tuple[Tensor, Tensor]:
    """The images encoded as samples `[n, ...]`, and their conditions `[n]`, both on the CPU."""
    height, width = base.family.pixels(base.sample_shape, base.source.scale)
    vae = base.source.vae()
    images = encode_images(vae, data.files, height, width, base.device, channels=3 if vae else base.sample_shape[0])
    if images.shape[1:] != base.sample_shape:
        raise UserError(
            f"images give samples of shape {tuple(images.shape[1:])}, but the model takes {base.sample_shape}; for a video "
            "model pass --num_frames 1, or --rollout pool"
        )
    if not base.family.takes_prompts:
        return images, torch.full((len(images),), base.null_condition)
    number = {prompt: index for index, prompt in enumerate(data.prompts)}
    return images, torch.tensor([number[caption] for caption in data.captions])
