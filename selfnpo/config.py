"""The settings of a training run, under the names that diffusers' training scripts use.

Precedence: preset < --config file < command line. A test checks that every field is read somewhere. Some flags also accept
their names from kohya's scripts and from the authors' released code.
"""

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from tyro.conf import arg

from selfnpo.cli import as_flags, parse
from selfnpo.errors import UserError, first_line
from selfnpo.models.source import Source
from selfnpo.options import DEMO, NONE, ModelOptions, Precision, SampleOptions
from selfnpo.output import check_kept


def _preset_arg(*aliases: str) -> object:
    """For a field whose default depends on the preset, the model family or LoRA: `--help` says so, with the demo's value."""
    return arg(
        aliases=aliases, help_behavior_hint=lambda value: f"(default: set by the preset and the model; {value} on the demo)"
    )


@dataclass(frozen=True)
class TrainConfig(SampleOptions, ModelOptions):
    """Train a negative model from a diffusion model's own truncated rollouts."""

    preset: Literal["default", "paper", "released"] = "default"
    """default: the best settings measured here; paper: the paper's text; released: the authors' code, which needs images."""
    config: Path | None = None
    """YAML file with any of these settings, such as config.yaml from an earlier run."""

    output_dir: Path = Path("runs/demo")
    """Folder for all output."""
    overwrite: bool = False
    """Replace the results of an earlier run in output_dir. Other files there are kept."""
    resume_from_checkpoint: Annotated[str | None, arg(aliases=("--resume",))] = None
    """latest, or a checkpoint folder. The run continues exactly from there."""

    prompts: str = NONE
    """File of training prompts: text with one per line, or .jsonl with "prompt", "text" or "caption". none: empty prompt."""
    prompt_dataset: str | None = None
    """Training prompts from a Hugging Face dataset, as NAME:COLUMN (pip install 'selfnpo[datasets]')."""
    train_data_dir: Path | None = None
    """Folder of images to start rollouts from (for data rollouts). Captions come from metadata.jsonl or .txt files."""

    rank: Annotated[int, arg(aliases=("--network_dim", "--lora_rank"))] = 0
    """Rank of the LoRA to train; 0 trains the full weights."""
    lora_alpha: Annotated[float | None, arg(aliases=("--network_alpha",))] = None
    """The LoRA's output is scaled by alpha / rank. By default alpha = rank, a scale of 1."""
    lora_target_modules: tuple[str, ...] = ()
    """Layers that the LoRA adapts, as suffixes of their names; by default the family's usual layers."""
    mixed_precision: Precision = "auto"
    """Precision of the networks. auto: bf16 on GPUs that support it, no (float32) elsewhere."""
    gradient_checkpointing: Annotated[bool, _preset_arg()] = False
    """Recompute activations in the backward pass to save memory."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step, with train_batch_size samples each."""
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    """sdpa: PyTorch's own attention. auto: the fastest of its backends, measured per shape on a GPU."""
    low_vram: bool = False
    """Save GPU memory: checkpoint gradients, and keep prompts (and the reference of full weights) on the host."""
    allow_tf32: bool = False
    """Allow TF32 in float32 matrix products on GPUs."""

    seed: int = 0
    """Seed of every random number in the run."""
    max_train_steps: Annotated[int, _preset_arg()] = 2000
    """Optimizer steps."""
    train_batch_size: Annotated[int, _preset_arg()] = 128
    """Samples per forward pass."""
    learning_rate: Annotated[float, _preset_arg()] = 5e-5
    """Peak learning rate of AdamW."""
    lr_scheduler: Annotated[Literal["constant", "constant_with_warmup", "linear", "cosine"], _preset_arg()] = "cosine"
    """Learning rate schedule."""
    lr_warmup_steps: Annotated[int, _preset_arg()] = 100
    """Steps of learning rate warmup."""
    adam_beta1: float = 0.9
    """AdamW's beta1."""
    adam_beta2: float = 0.999
    """AdamW's beta2."""
    adam_weight_decay: Annotated[float, _preset_arg()] = 1e-3
    """AdamW's weight decay."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    use_8bit_adam: bool = False
    """Store AdamW's moments in 8 bits (pip install 'selfnpo[bitsandbytes]')."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it."""

    rollout: Annotated[Literal["pool", "fresh", "full", "data"], _preset_arg()] = "pool"
    """Where training samples come from; see selfnpo/training/rollout.py."""
    pool_size: int = 8
    """Number of batches of trajectories in the pool (for pool rollouts). More makes consecutive batches less alike."""
    num_inference_steps: Annotated[int, arg(aliases=("--num_ddim_timesteps",))] = 25
    """Points in the DDIM grid of a rollout."""
    num_rollout_steps: int = 5
    """K, the number of rollout steps from a noised image (for data rollouts)."""
    rollout_guidance_scale: Annotated[float, _preset_arg()] = 0.0
    """Guidance scale of rollouts: 0 is unconditional, 1 conditional, above 1 guided."""
    reference_decay: Annotated[float, _preset_arg()] = 0.999
    """The reference is an exponential moving average of the student with this decay; 1 keeps it frozen."""
    condition_dropout: Annotated[float, _preset_arg("--proportion_empty_prompts", "--caption_dropout_rate")] = 0.1
    """Fraction of the student's conditions to replace with the null condition."""
    loss: Annotated[Literal["l2", "huber"], _preset_arg("--loss_type")] = "l2"
    """Distance between the student's x_0 prediction and the target."""
    loss_weighting: Annotated[Literal["x0", "epsilon"], _preset_arg()] = "epsilon"
    """x0: unweighted, as in the paper. epsilon: weighted by alpha_s / sigma_s, which measures the error in noise units."""
    huber_c: float = 1e-3
    """Error at which the Huber loss changes from quadratic to linear."""
    max_relative_delta: float | None = None
    """Stop once training has moved the weights this far: ||delta|| / ||theta||, such as 0.03 for 3 %."""

    validation_prompt: tuple[str, ...] = ()
    """Prompts (or class numbers) for the sample grids; by default the first training conditions."""
    validation_steps: Annotated[int, arg(aliases=("--sample_every_n_steps",))] = 0
    """Steps between sample grids, which compare plain and negative guidance. 0: only one at the end."""
    num_validation_images: int = 4
    """Images per method in a grid."""
    validation_guidance_scale: float | None = None
    """Guidance scale for the sample grids, as in diffusers; by default the model family's usual value."""

    compile: bool = False
    """Compile the reference and the student with torch.compile."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Replay each training step as one CUDA graph. auto: on a GPU, when the settings allow it."""
    tandem: Literal["auto", "sequential", "streams", "shared"] = "auto"
    """How reference and student share a step (see selfnpo/training/tandem.py). auto: the fastest, measured at the start."""
    checkpointing_minutes: float = 10.0
    """Minutes of training between checkpoints. The run also saves one at the end."""
    checkpointing_steps: Annotated[int, arg(aliases=("--save_every_n_steps",))] = 0
    """Steps between checkpoints, instead of minutes. 0: use checkpointing_minutes."""
    checkpoints_total_limit: int = 2
    """Number of checkpoints to keep; older ones are deleted."""
    logging_steps: int = 10
    """Steps between lines in log.jsonl."""
    report_to: Annotated[Literal["none", "tensorboard", "wandb"], arg(aliases=("--log_with",))] = "none"
    """Also log metrics and sample grids to TensorBoard (pip install 'selfnpo[tensorboard]') or wandb ('selfnpo[wandb]')."""
    logging_dir: Path = Path("tensorboard")
    """TensorBoard's folder, relative to output_dir."""
    push_to_hub: bool = False
    """Upload the finished negative to the Hugging Face hub, as the user logged in with hf auth login."""
    hub_model_id: Annotated[str | None, arg(aliases=("--huggingface_repo_id",))] = None
    """Repository to upload to; by default the name of output_dir."""

    @property
    def total_batch_size(self) -> int:
        """Samples per optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps


# What each preset changes. `released` uses the values of the released SD1.5 script, including rollouts from data. `paper`
# follows the paper's text, which does not give the optimizer settings, so they are taken from the release.
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

# These belong to one invocation, not to the run, so config.yaml leaves them out.
_INVOCATION = {"config", "overwrite", "resume_from_checkpoint", "push_to_hub", "hub_model_id"}
# A resumed run may change these too, because they do not affect the result.
_FREE_ON_RESUME = _INVOCATION | {
    "preset", "output_dir", "compile", "capture", "tandem", "checkpointing_minutes", "checkpointing_steps",
    "checkpoints_total_limit", "logging_steps", "report_to", "logging_dir", "validation_steps", "num_validation_images",
    "validation_guidance_scale", "local_files_only",
}  # fmt: skip


def parse_config(
    args: Sequence[str] | None = None, check_early: Callable[[TrainConfig], object] = lambda config: None
) -> TrainConfig:
    """The settings of a command line: preset, then --config file, then flags.

    A preset's values depend on the model, so its configuration is opened.

    Args:
        check_early: called with the user's settings before that, because opening a model imports diffusers, which is slow.
    """
    given = parse(TrainConfig, args)
    from_file = [] if given.config is None else as_flags(_read(given.config))  # so that file and flags get the same checks
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
    """A preset for a model family. A LoRA trains at its own usual learning rate."""
    values = PRESETS[name] | (of_family or {}).get(name, {}) | ({"learning_rate": 1e-4} if lora else {})
    return TrainConfig(preset=name, **values)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {path} could not be read: {error.strerror}; expected a YAML file") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        where = getattr(error, "problem_mark", None)
        why = f"{error.problem} in line {where.line + 1}" if where else first_line(error)
        raise UserError(f"config {path} could not be read as YAML: {why}") from error
    if not isinstance(values, dict):
        raise UserError(f"config {path} contains no settings; expected lines of the form 'name: value'")
    return values


def check(config: TrainConfig) -> TrainConfig:
    """Return the configuration, or raise a UserError that names the first value out of range."""
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
    if config.lora_alpha is not None and not 0 < config.lora_alpha < math.inf:
        raise UserError(f"lora_alpha is {config.lora_alpha}; expected a positive number, usually the rank")
    scale = config.validation_guidance_scale
    if scale is not None and not 1 < scale <= 100:
        raise UserError(f"validation_guidance_scale is {scale}; expected a value above 1 and up to 100, such as 7.5")
    if config.train_data_dir is not None and config.rollout != "data":
        raise UserError(
            f"train_data_dir is given, but rollout is {config.rollout}; expected --rollout data or --preset released"
        )
    if config.max_relative_delta is not None and not 0 < config.max_relative_delta < math.inf:
        raise UserError(f"max_relative_delta is {config.max_relative_delta}; expected a positive number, such as 0.05")
    if config.overwrite:
        check_kept(config.output_dir / "negative", config.sources)
    if config.report_to != "none" and not _is_installed(config.report_to):
        raise UserError(
            f"report_to is {config.report_to}, which is not installed; run pip install 'selfnpo[{config.report_to}]'"
        )
    if config.use_8bit_adam and not _is_installed("bitsandbytes"):
        raise UserError("use_8bit_adam needs the package bitsandbytes; run pip install 'selfnpo[bitsandbytes]'")
    return config


def check_data(config: TrainConfig) -> None:
    """Raise a UserError if images are missing, or given beside prompts."""
    if config.train_data_dir is None and config.rollout == "data" and config.pretrained_model_name_or_path != DEMO:
        raise UserError(
            "rollouts start from data (--rollout data, or --preset released), but no images are given; pass "
            "--train_data_dir FOLDER, or --rollout pool, which needs none"
        )
    if config.train_data_dir is not None and (config.prompts != NONE or config.prompt_dataset is not None):
        raise UserError("prompts are given, but rollouts from images use the images' captions; leave out one of the two")


def _is_installed(package: str) -> bool:
    """A folder of that name, such as one with logs, does not count as a package."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def to_yaml(config: TrainConfig) -> str:
    """The YAML that `--config` reads back."""
    values = {name: value for name, value in asdict(config).items() if name not in _INVOCATION}
    return yaml.safe_dump(json.loads(json.dumps(values, default=str)), sort_keys=False)


def binding(config: TrainConfig) -> dict[str, Any]:
    """The settings that must stay the same when a run is resumed."""
    values = {name: value for name, value in asdict(config).items() if name not in _FREE_ON_RESUME}
    return json.loads(json.dumps(values, default=str))
