"""What is measured: published architectures with random weights and random prompts. On a GPU they have their real sizes. On
a CPU, smaller stand-ins of the same family are used and named as such."""

import atexit
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import published
from selfnpo.budget.memory import memory_plan
from selfnpo.config import TrainConfig, preset_config
from selfnpo.device import default_device, free_memory
from selfnpo.errors import UserError
from selfnpo.models import Conditions, ModelOptions, PretrainedModel, SampleOptions, Source
from selfnpo.schedule import make_grid
from selfnpo.training.rollout import DataRollout, Reference
from selfnpo.training.trainer import Trainer

DEVICE = default_device()
ON_GPU = DEVICE.type == "cuda"
PRECISION, DTYPE = ("bf16", torch.bfloat16) if ON_GPU else ("no", torch.float32)
PROMPTS = 16


class DoesNotFit(UserError):
    """There is not enough memory."""


@dataclass(frozen=True)
class Workload:
    name: str
    source: Source
    config: TrainConfig
    channels_last: bool = False  # even without compilation

    def describe(self) -> str:
        return f"{self.name}, batch {self.config.train_batch_size}"

    def changed(self, **changes: Any) -> "Workload":
        return replace(self, config=replace(self.config, **changes))

    def check_fits(self, processes: int = 1) -> None:
        """
        Raises:
            DoesNotFit: so many runs do not fit into memory at once.
        """
        needed = processes * memory_plan(self.config, self.source, PROMPTS, DEVICE).total
        free = free_memory(DEVICE)
        if needed > free:
            what = self.describe() + (f", in {processes} processes" if processes > 1 else "")
            raise DoesNotFit(f"{what}: got {free / 2**30:.1f} GiB of free memory, needed {needed / 2**30:.1f} by the plan")

    def trainer(self, output_dir: Path | None = None) -> Trainer:
        """A trainer with a fresh copy of the model."""
        base, config = self.load(), self.config
        return Trainer(config, base, output_dir, data_rollout(config, base) if config.rollout == "data" else None)

    def load(self) -> PretrainedModel:
        """The model with random weights, placed as by `selfnpo.inputs.data.load_base`."""
        family, config = self.source.family, self.source.config
        torch.manual_seed(0)
        with DEVICE:
            model = family.denoiser_class.from_config(config)
        home = (DEVICE, DTYPE) if self.config.rank else ("cpu", torch.float32)
        layout = torch.channels_last if self.channels_last else None
        model = nn.Module.to(model, *home, memory_format=layout).eval().requires_grad_(False)  # diffusers' own `to` warns
        shape = family.sample_shape(config, self.source.scale, self.config)
        shapes = family.condition_shapes(config).items()
        rows = {name: torch.randn(PROMPTS + 1, *row, device=DEVICE, dtype=DTYPE) for name, row in shapes}
        constants = {
            name: value.to(DEVICE) if isinstance(value, Tensor) else tuple(each.to(DEVICE) for each in value)
            for name, value in family.constants(config, shape, self.source.scale, self.config).items()
        }
        conditions = Conditions(PROMPTS, rows, constants)
        return PretrainedModel(family, model, self.source.scheduler, conditions, shape, DEVICE, DTYPE, self.source)


def data_rollout(config: TrainConfig, base: PretrainedModel) -> DataRollout:
    """The released recipe's rollout, but from random latents."""
    grid = make_grid(base.scheduler, config.num_inference_steps)
    reference = Reference(base, grid, config.rollout_guidance_scale, config.train_batch_size)
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(64, *base.sample_shape, generator=generator)
    classes = torch.randint(base.num_conditions, (64,), generator=generator)
    return DataRollout(reference, config.total_batch_size, config.seed, grid, samples, classes, config.num_rollout_steps)


def train_step(workload: Workload) -> Callable[[], object]:
    """The training step of a fresh loop.

    Raises:
        DoesNotFit: it does not fit into memory.
    """
    workload.check_fits()
    return workload.trainer().train_step


def evaluations(config: TrainConfig) -> float:
    """Evaluations of the reference per sample, on average. A finished sample is not evaluated again."""
    length = config.num_inference_steps
    return {
        "pool": 1,
        "fresh": (length + 1) / 2,
        "full": length,
        "data": mean(min(config.num_rollout_steps, length - 1 - start) + 1 for start in range(length)),
    }[config.rollout]


def sd15(side: int = 64 if ON_GPU else 16) -> Workload:
    """SD1.5 for latents of `side` x `side`."""
    return _workload("SD1.5", side)


def sdxl() -> Workload:
    return _workload("SDXL", None)


def cogvideox() -> Workload:
    return _workload("CogVideoX-2b", None)


def real(name: str, **changes: Any) -> Workload:
    """A model in its published size, for counting. Nothing of this size is created on a CPU."""
    source = _source(name, real=True)
    config = preset_config("default", source.family.presets, changes.get("rank", 0) > 0)
    return Workload(name, source, replace(config, mixed_precision="bf16", **changes))


def _workload(name: str, side: int | None) -> Workload:
    source = _source(name, ON_GPU)
    sizes = SampleOptions(resolution=side * source.scale) if side else SampleOptions()
    config = replace(
        preset_config("default", source.family.presets), max_train_steps=10**6, pool_size=2, mixed_precision=PRECISION,
        resolution=sizes.resolution,
    )  # fmt: skip
    label = name if ON_GPU else f"stand-in for {name}"
    *_, height, width = source.family.sample_shape(source.config, source.scale, sizes)
    return Workload(f"{label}, {height}x{width}", source, config)


@cache
def _source(name: str, real: bool) -> Source:
    files = PUBLISHED[name]
    if not real:
        files = {path: content | STAND_INS[name].get(path, {}) for path, content in files.items()}
    folder = tempfile.TemporaryDirectory(prefix="selfnpo-benchmarks-")
    atexit.register(folder.cleanup)
    return Source(ModelOptions(str(published.write(files, Path(folder.name)))))


PUBLISHED = {
    "SD1.5": published.STABLE_DIFFUSION_1_5,
    "SDXL": published.STABLE_DIFFUSION_XL,
    "CogVideoX-2b": published.COGVIDEOX_2B,
}
# What stand-ins change in the published configurations: about a tenth as wide, two levels or a few layers, short prompts.
STAND_INS: dict[str, dict[str, dict[str, Any]]] = {
    "SD1.5": {
        "unet/config.json": {
            "block_out_channels": [32, 64],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 1,
            "cross_attention_dim": 32,
            "sample_size": 16,
        }
    },
    "SDXL": {
        "unet/config.json": {
            "block_out_channels": [32, 64],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2],
            "attention_head_dim": [4, 8],
            "layers_per_block": 1,
            "cross_attention_dim": 32,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
            "sample_size": 16,
        }
    },
    "CogVideoX-2b": {
        "transformer/config.json": {
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "num_layers": 4,
            "text_embed_dim": 32,
            "time_embed_dim": 32,
            "max_text_seq_length": 16,
            "sample_frames": 9,
            "sample_height": 16,
            "sample_width": 24,
        }
    },
}
