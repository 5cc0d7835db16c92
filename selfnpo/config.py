"""The settings of a training run, under the names that diffusers' training scripts use.

Precedence: preset < --config file < command line. Every field is read somewhere; a test holds this. Some flags are known
by their names in kohya's scripts and in the authors' released code too.
"""

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from tyro.conf import arg

from selfnpo.cli import as_flags, parse
from selfnpo.errors import UserError, first_line
from selfnpo.models.source import Source
from selfnpo.options import ModelOptions, Precision, SampleOptions


def _preset_arg(*aliases: str) -> object:
    """For a field that a preset, a family of models or a LoRA changes: `--help` says so beside its value on the demo."""
    return arg(
        aliases=aliases, help_behavior_hint=lambda value: f"(default: the preset's for the model; {value} on the demo)"
    )


@dataclass(frozen=True)
class TrainConfig(SampleOptions, ModelOptions):
    """Train a negative model from a diffusion model's own truncated rollouts."""

    preset: Literal["default", "paper", "released"] = "default"
    """default: what measures best here; paper: the paper's text; released: the authors' released recipe, from images."""
    config: Path | None = None
    """YAML file with any of these settings, such as the config.yaml of an earlier run."""

    output_dir: Path = Path("runs/demo")
    """Where everything is written."""
    overwrite: bool = False
    """Replace the results of an earlier run in output_dir; other files there stay."""
    resume_from_checkpoint: Annotated[str | None, arg(aliases=("--resume",))] = None
    """latest, or a checkpoint folder; continues exactly where that checkpoint was taken."""

    prompts: str = "none"
    """Prompts to train on: a text file with one a line, a .jsonl file with "prompt", "text" or "caption", or none for ""."""
    prompt_dataset: str | None = None
    """Prompts from a column of a Hugging Face dataset, as NAME:COLUMN (pip install 'selfnpo[datasets]')."""
    train_data_dir: Path | None = None
    """Folder of images to start rollouts from (rollout data); captions from metadata.jsonl or .txt files."""

    rank: Annotated[int, arg(aliases=("--network_dim", "--lora_rank"))] = 0
    """Rank of a LoRA to train; 0 trains the full weights."""
    lora_alpha: Annotated[float | None, arg(aliases=("--network_alpha",))] = None
    """The LoRA's changes are scaled by alpha / rank; by default 1."""
    lora_target_modules: tuple[str, ...] = ()
    """Layers that a LoRA adapts, by the ends of their names; by default the family's attention projections."""
    mixed_precision: Precision = "auto"
    """Arithmetic of the networks; auto is bf16 on GPUs that have it and no (float32) elsewhere."""
    gradient_checkpointing: Annotated[bool, _preset_arg()] = False
    """Compute activations again in the backward pass instead of keeping them."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step, each of train_batch_size samples."""
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    """sdpa is PyTorch's own attention; auto is the fastest of its backends, measured per shape on a GPU."""
    low_vram: bool = False
    """Least memory: gradients checkpointed, prompts on the host, and for full weights the reference too."""
    allow_tf32: bool = False
    """Let float32 matrix products on GPUs round to TF32."""

    seed: int = 0
    """Key of every random number of the run."""
    max_train_steps: Annotated[int, _preset_arg()] = 2000
    """Optimizer steps."""
    train_batch_size: Annotated[int, _preset_arg()] = 128
    """Samples per forward pass."""
    learning_rate: Annotated[float, _preset_arg()] = 5e-5
    """Peak learning rate of AdamW."""
    lr_scheduler: Annotated[Literal["constant", "constant_with_warmup", "linear", "cosine"], _preset_arg()] = "cosine"
    """Course of the learning rate."""
    lr_warmup_steps: Annotated[int, _preset_arg()] = 100
    """Steps over which the learning rate rises."""
    adam_beta1: float = 0.9
    """AdamW's first decay."""
    adam_beta2: float = 0.999
    """AdamW's second decay."""
    adam_weight_decay: Annotated[float, _preset_arg()] = 1e-3
    """AdamW's weight decay."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    use_8bit_adam: bool = False
    """Keep AdamW's moments in 8 bits (pip install 'selfnpo[bitsandbytes]')."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down."""

    rollout: Annotated[Literal["pool", "fresh", "full", "data"], _preset_arg()] = "pool"
    """Where training samples come from; see selfnpo/training/rollout.py."""
    pool_size: int = 8
    """Trajectories under way in pool mode, in batches; the more, the less alike consecutive batches are."""
    num_inference_steps: Annotated[int, arg(aliases=("--num_ddim_timesteps",))] = 25
    """Points of the DDIM grid of a rollout."""
    num_rollout_steps: int = 5
    """K: steps of a rollout that starts from data (rollout data)."""
    rollout_guidance_scale: Annotated[float, _preset_arg()] = 0.0
    """Guidance of the reference in its rollouts: 0 unconditional, 1 conditional, above 1 guided."""
    reference_decay: Annotated[float, _preset_arg()] = 0.999
    """The reference is an exponential moving average of the student with this decay; 1 keeps it frozen."""
    condition_dropout: Annotated[float, _preset_arg("--proportion_empty_prompts", "--caption_dropout_rate")] = 0.1
    """Share of the student's conditions replaced by the null condition."""
    loss: Annotated[Literal["l2", "huber"], _preset_arg("--loss_type")] = "l2"
    """Distance between the student's x_0 and the target."""
    loss_weighting: Annotated[Literal["x0", "epsilon"], _preset_arg()] = "epsilon"
    """x0: as the paper writes it; epsilon: weighted by alpha_s / sigma_s, in units of the noise."""
    huber_c: float = 1e-3
    """Where the Huber loss turns from quadratic to linear."""
    max_relative_delta: float | None = None
    """Stop when the fine-tuning has moved the weights this far: ||delta|| / ||theta||."""

    validation_prompt: tuple[str, ...] = ()
    """Prompts, or class numbers, of the sample grids; by default the first conditions of the training."""
    validation_steps: Annotated[int, arg(aliases=("--sample_every_n_steps",))] = 0
    """Steps between sample grids, plain beside negative-guided; 0: only one at the end."""
    num_validation_images: int = 4
    """Images of a grid per method."""
    validation_guidance_scale: float | None = None
    """Guidance scale of the sample grids, as in diffusers; by default the family's usual one."""

    compile: bool = False
    """Compile reference and student with torch.compile."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Replay a training step as one CUDA graph; auto: on a GPU, where the settings allow it."""
    tandem: Literal["auto", "sequential", "streams", "shared"] = "auto"
    """How reference and student share a step, see selfnpo/training/tandem.py; auto measures what can run."""
    checkpointing_minutes: float = 10.0
    """Minutes of training between checkpoints; there is one at the end too."""
    checkpointing_steps: Annotated[int, arg(aliases=("--save_every_n_steps",))] = 0
    """Steps between checkpoints, in place of minutes; 0: by minutes."""
    checkpoints_total_limit: int = 2
    """Checkpoints to keep; older ones are deleted."""
    logging_steps: int = 10
    """Steps between lines of log.jsonl."""
    report_to: Annotated[Literal["none", "tensorboard", "wandb"], arg(aliases=("--log_with",))] = "none"
    """Also log numbers and sample grids, to TensorBoard (pip install 'selfnpo[tensorboard]') or wandb ('selfnpo[wandb]')."""
    logging_dir: Path = Path("tensorboard")
    """TensorBoard's folder; a relative path lies in output_dir."""
    push_to_hub: bool = False
    """Upload the finished negative to the Hugging Face hub, as the user of hf auth login."""
    hub_model_id: Annotated[str | None, arg(aliases=("--huggingface_repo_id",))] = None
    """Repository to upload to; by default named like output_dir."""

    @property
    def total_batch_size(self) -> int:
        """Samples per optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps


# What a preset changes against the defaults. `released` has the values of the released SD1.5 script, rollouts from data
# included; `paper` those of the paper's text, which leaves the optimizer to the release.
_RELEASED_OPTIMIZER = {
    "max_train_steps": 1000,
    "train_batch_size": 20,
    "learning_rate": 1e-6,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": _RELEASED_OPTIMIZER
    | {
        "rollout": "fresh",
        "rollout_guidance_scale": 1.0,
        "reference_decay": 1.0,
        "condition_dropout": 0.0,
        "loss_weighting": "x0",
    },
    "released": _RELEASED_OPTIMIZER
    | {
        "rollout": "data",
        "num_rollout_steps": 5,
        "rollout_guidance_scale": 0.0,
        "reference_decay": 0.999,
        "condition_dropout": 0.0,
        "loss": "huber",
        "huber_c": 1e-3,
        "loss_weighting": "x0",
    },
}

# About this invocation, not about the run: left out of config.yaml.
_INVOCATION = {"config", "overwrite", "resume_from_checkpoint", "push_to_hub", "hub_model_id"}
# A resumed run may change these too, because they do not touch what is computed.
_FREE_ON_RESUME = _INVOCATION | {
    "preset", "output_dir", "compile", "capture", "tandem", "checkpointing_minutes", "checkpointing_steps",
    "checkpoints_total_limit", "logging_steps", "report_to", "logging_dir", "validation_steps", "num_validation_images",
    "validation_guidance_scale", "local_files_only",
}  # fmt: skip


def parse_config(
    args: Sequence[str] | None = None, check_early: Callable[[TrainConfig], object] = lambda config: None
) -> TrainConfig:
    """The settings of a command line: preset, then --config file, then flags.

    The values of a preset depend on the model, whose configuration is opened for that.

    Args:
        check_early: called with the user's own settings before that, for opening a model imports diffusers, which is slow.
    """
    given = parse(TrainConfig, args)
    from_file = [] if given.config is None else as_flags(_read(given.config))  # so that both are checked alike
    try:
        in_file = parse(TrainConfig, from_file)
    except UserError as error:
        raise UserError(f"in config {given.config}: {error}") from error
    named = parse(TrainConfig, args, default=in_file)
    check_early(check(parse(TrainConfig, args, default=parse(TrainConfig, from_file, default=preset_config(named.preset)))))
    family = Source(named).family
    defaults = parse(TrainConfig, from_file, default=preset_config(named.preset, family.presets, named.rank > 0))
    return check(parse(TrainConfig, args, default=replace(defaults, preset=named.preset)))


def preset_config(name: str, of_family: dict[str, dict[str, Any]] | None = None, lora: bool = False) -> TrainConfig:
    """A preset for a family of models; LoRA trains at the learning rate that is usual for it."""
    values = PRESETS[name] | (of_family or {}).get(name, {}) | ({"learning_rate": 1e-4} if lora else {})
    return TrainConfig(preset=name, **values)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config {path} could not be read as YAML: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"config {path} holds no settings; expected lines of 'name: value'")
    return values


def check(config: TrainConfig) -> TrainConfig:
    """The configuration itself, or a UserError that names the first value out of range."""
    for name, low, high in (
        ("max_train_steps", 1, 10**7),
        ("train_batch_size", 1, 10**5),
        ("learning_rate", 0, 1),
        ("lr_warmup_steps", 0, 10**7),
        ("adam_beta1", 0, 0.999999),
        ("adam_beta2", 0, 0.999999),
        ("adam_weight_decay", 0, 1),
        ("adam_epsilon", 1e-12, 1),
        ("max_grad_norm", 1e-6, 1e6),
        ("seed", 0, 2**63 - 1),
        ("pool_size", 1, 10**4),
        ("num_inference_steps", 2, 1000),
        ("num_rollout_steps", 1, config.num_inference_steps - 1 if config.rollout == "data" else 1000),
        ("rollout_guidance_scale", -100, 100),
        ("rank", 0, 10**5),
        ("gradient_accumulation_steps", 1, 10**5),
        ("validation_steps", 0, 10**7),
        ("num_validation_images", 1, 64),
        ("reference_decay", 0, 1),
        ("condition_dropout", 0, 1),
        ("huber_c", 1e-8, 1e3),
        ("checkpointing_minutes", 0.01, 10**5),
        ("checkpointing_steps", 0, 10**7),
        ("checkpoints_total_limit", 1, 10**4),
        ("logging_steps", 1, 10**7),
    ):
        value = getattr(config, name)
        if not low <= value <= high:  # also catches NaN
            raise UserError(f"{name} is {value}; expected a value from {low} to {high}")
    if config.lora_alpha is not None and not config.lora_alpha > 0:
        raise UserError(f"lora_alpha is {config.lora_alpha}; expected a positive number, usually the rank")
    scale = config.validation_guidance_scale
    if scale is not None and not 1 < scale <= 100:
        raise UserError(f"validation_guidance_scale is {scale}; expected a value above 1 and up to 100, such as 7.5")
    if config.train_data_dir is not None and config.rollout != "data":
        raise UserError(
            f"train_data_dir is given, but rollout is {config.rollout}; expected --rollout data or --preset released"
        )
    if config.max_relative_delta is not None and not config.max_relative_delta > 0:
        raise UserError(f"max_relative_delta is {config.max_relative_delta}; expected a positive number, such as 0.05")
    if config.report_to != "none" and not _is_installed(config.report_to):
        raise UserError(
            f"report_to is {config.report_to}, which is not installed; run pip install 'selfnpo[{config.report_to}]'"
        )
    if config.use_8bit_adam and not _is_installed("bitsandbytes"):
        raise UserError("use_8bit_adam needs the package bitsandbytes; run pip install 'selfnpo[bitsandbytes]'")
    return config


def _is_installed(package: str) -> bool:
    """A folder of that name, such as one of logs, is no package."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def to_yaml(config: TrainConfig) -> str:
    """What `--config` reads back."""
    values = {name: value for name, value in asdict(config).items() if name not in _INVOCATION}
    return yaml.safe_dump(json.loads(json.dumps(values, default=str)), sort_keys=False)


def binding(config: TrainConfig) -> dict[str, Any]:
    """The settings that a run cannot change without becoming another run."""
    values = {name: value for name, value in asdict(config).items() if name not in _FREE_ON_RESUME}
    return json.loads(json.dumps(values, default=str))
