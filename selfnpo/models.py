"""Pretrained diffusion models: a denoiser, its scheduler and the conditions it is asked for.

The denoiser is a diffusers model. A condition is one row of each keyword argument that the denoiser takes (for a DiT:
`class_labels`), encoded once; everywhere else in the project a condition is its row number.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import DiTTransformer2DModel, SchedulerMixin
from torch import Tensor, nn

from selfnpo.errors import UserError

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "world" / "weights"


@dataclass(frozen=True)
class PretrainedModel:
    denoiser: DiTTransformer2DModel
    scheduler: SchedulerMixin
    conditions: dict[str, Tensor]  # keyword argument of the denoiser -> [n + 1, ...]; the last row is the null condition
    sample_shape: tuple[int, ...]  # of one sample: (channels, height, width)

    @property
    def num_conditions(self) -> int:
        return len(next(iter(self.conditions.values()))) - 1

    @property
    def null_condition(self) -> int:
        return self.num_conditions

    def predict(self, denoiser: nn.Module, sample: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """model_output of any denoiser of this architecture for `sample` `[B, ...]`, `timesteps` and `condition` `[B]`."""
        kwargs = {name: rows[condition] for name, rows in self.conditions.items()}
        return denoiser(sample, timesteps, return_dict=False, **kwargs)[0]

    def predict_guided(
        self, denoiser: nn.Module, sample: Tensor, timesteps: Tensor, condition: Tensor, guidance_scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """(cond, uncond) for `guided_step`, evaluating only what the guidance scale needs: at 0 and 1 a single branch."""
        null = torch.full_like(condition, self.null_condition)
        if guidance_scale in (0, 1):
            return self.predict(denoiser, sample, timesteps, condition if guidance_scale else null), None
        both = self.predict(denoiser, torch.cat((sample,) * 2), torch.cat((timesteps,) * 2), torch.cat((null, condition)))
        uncond, cond = both.chunk(2)
        return cond, uncond


def load_denoiser(folder: Path) -> DiTTransformer2DModel:
    """A denoiser from a diffusers model folder (config.json and safetensors), in evaluation mode.

    Raises:
        UserError: the folder, its configuration or its weights are missing, corrupt or of another architecture.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json; expected a diffusers model folder (config.json and *.safetensors)")
    try:
        denoiser, info = DiTTransformer2DModel.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, low_cpu_mem_usage=False
        )
    except Exception as error:  # diffusers raises many kinds, also from the parsers beneath it
        raise UserError(
            f"{folder} could not be loaded as a DiTTransformer2DModel in safetensors: {_first_line(error)}"
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise UserError(f"{folder} does not fit its config.json: {kind.replace('_', ' ')} such as {info[kind][0]}")
    if not all(bool(parameter.isfinite().all()) for parameter in denoiser.parameters()):
        raise UserError(f"{folder} holds weights that are inf or NaN; restore them from an intact copy")
    return denoiser.eval().requires_grad_(False)


def load_negative(folder: Path, base: PretrainedModel) -> DiTTransformer2DModel:
    """A denoiser that must have the architecture of the base."""
    denoiser = load_denoiser(folder)
    expected = {name: parameter.shape for name, parameter in base.denoiser.named_parameters()}
    got = {name: parameter.shape for name, parameter in denoiser.named_parameters()}
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            raise UserError(
                f"{folder} has another architecture than the base: {name} is {got.get(name)}, expected {expected.get(name)}"
            )
    return denoiser


def load_pretrained(name_or_path: str) -> PretrainedModel:
    """`demo`, or a folder like a DiTPipeline's: transformer/ and scheduler/ of a class-conditional DiT in pixel space.

    Raises:
        UserError: a part is missing, corrupt or of another kind.
    """
    folder = DEMO_FOLDER if name_or_path == DEMO else Path(name_or_path)
    scheduler = _load_scheduler(folder / "scheduler", name_or_path)
    denoiser = load_denoiser(folder / "transformer")
    config = denoiser.config
    return PretrainedModel(
        denoiser=denoiser,
        scheduler=scheduler,
        conditions={"class_labels": torch.arange(config.num_embeds_ada_norm + 1)},
        sample_shape=(config.in_channels, config.sample_size, config.sample_size),
    )


def _load_scheduler(folder: Path, name_or_path: str) -> SchedulerMixin:
    path = folder / "scheduler_config.json"
    try:
        scheduler_class = getattr(diffusers, json.loads(path.read_text())["_class_name"])
        if not issubclass(scheduler_class, SchedulerMixin):
            raise TypeError(f"{scheduler_class.__name__} is no scheduler")
        return scheduler_class.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"pretrained_model_name_or_path is {name_or_path!r}; expected 'demo' or a folder with transformer/ and "
            f"{folder.name}/{path.name} ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
