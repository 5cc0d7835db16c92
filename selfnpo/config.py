"""The settings of a training run, under the names that diffusers' training scripts use.

Precedence: preset < --config file < command line. Every field is read somewhere; a test holds this.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from selfnpo.cli import parse
from selfnpo.errors import UserError
from selfnpo.models import DEMO


@dataclass(frozen=True)
class TrainConfig:
    """Train a negative model from a diffusion model's own truncated rollouts."""

    preset: Literal["default", "paper", "released"] = "default"
    """default: what measures best here; paper: the paper's text; released: the authors' released SD1.5 recipe."""
    config: Path | None = None
    """YAML file with any of these settings, such as the config.yaml of an earlier run."""

    pretrained_model_name_or_path: str = DEMO
    """The model to make a negative for: demo, or a folder laid out as the demo's weights."""
    output_dir: Path = Path("runs/demo")
    """Where everything is written."""
    overwrite: bool = False
    """Replace the results of an earlier run in output_dir; other files there stay."""
    resume_from_checkpoint: str | None = None
    """latest, or a checkpoint folder; continues exactly where that checkpoint was taken."""

    seed: int = 0
    """Key of every random number of the run."""
    max_train_steps: int = 2000
    """Optimizer steps."""
    train_batch_size: int = 128
    """Samples per step."""
    learning_rate: float = 5e-5
    """Peak learning rate of AdamW."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    """Course of the learning rate."""
    lr_warmup_steps: int = 100
    """Steps over which the learning rate rises."""
    adam_beta1: float = 0.9
    """AdamW's first decay."""
    adam_beta2: float = 0.999
    """AdamW's second decay."""
    adam_weight_decay: float = 1e-3
    """AdamW's weight decay."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down."""

    rollout: Literal["pool", "fresh", "full", "data"] = "pool"
    """Where training samples come from; see selfnpo/rollout.py."""
    pool_size: int = 8
    """Trajectories under way in pool mode, in batches; the more, the less alike consecutive batches are."""
    num_inference_steps: int = 25
    """Points of the DDIM grid of a rollout."""
    num_rollout_steps: int = 5
    """K: steps of a rollout that starts from data."""
    rollout_guidance_scale: float = 0.0
    """Guidance of the reference in its rollouts: 0 unconditional, 1 conditional, above 1 guided."""
    reference_decay: float = 0.999
    """The reference is an exponential moving average of the student with this decay; 1 keeps it frozen."""
    condition_dropout: float = 0.1
    """Share of the student's conditions replaced by the null condition."""
    loss: Literal["l2", "huber"] = "l2"
    """Distance between the student's x_0 and the target."""
    loss_weighting: Literal["x0", "epsilon"] = "epsilon"
    """x0: as the paper writes it; epsilon: weighted by alpha_s / sigma_s, in units of the noise."""
    huber_c: float = 1e-3
    """Where the Huber loss turns from quadratic to linear."""
    max_relative_delta: float | None = None
    """Stop when the fine-tuning has moved the weights this far: ||delta|| / ||theta||."""

    compile: bool = False
    """Compile reference and student with torch.compile."""
    checkpointing_steps: int = 250
    """Steps between checkpoints."""
    checkpoints_total_limit: int = 2
    """Checkpoints to keep; older ones are deleted."""
    logging_steps: int = 10
    """Steps between lines of log.jsonl."""
    report_to: Literal["none", "tensorboard"] = "none"
    """Also log to TensorBoard (pip install 'selfnpo[tensorboard]')."""


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
_INVOCATION = {"config", "overwrite", "resume_from_checkpoint"}
# A resumed run may change these too, because they do not touch what is computed.
_FREE_ON_RESUME = _INVOCATION | {
    "preset", "output_dir", "compile", "checkpointing_steps", "checkpoints_total_limit", "logging_steps", "report_to",
}  # fmt: skip


def parse_config(args: Sequence[str] | None = None) -> TrainConfig:
    """The settings of a command line: preset, then --config file, then flags."""
    given = parse(TrainConfig, args)
    from_file = [] if given.config is None else _flags(given.config)
    try:
        named = parse(TrainConfig, from_file)
    except SystemExit:
        raise UserError(f"config {given.config} was not accepted; the message above names the setting") from None
    preset = given.preset if given.preset != "default" else named.preset
    defaults = parse(TrainConfig, from_file, default=preset_config(preset))
    return check(parse(TrainConfig, args, default=replace(defaults, preset=preset)))


def preset_config(name: str) -> TrainConfig:
    return TrainConfig(preset=name, **PRESETS[name])


def _flags(path: Path) -> list[str]:
    """A YAML file as command-line flags, so that both are checked alike."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config {path} could not be read as YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise UserError(f"config {path} holds no settings; expected lines of 'name: value'")
    flags = []
    for name, value in values.items():
        flags += [f"--{name}" if value else f"--no_{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return flags


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
        ("num_rollout_steps", 1, config.num_inference_steps - 1),
        ("rollout_guidance_scale", 0, 100),
        ("reference_decay", 0, 1),
        ("condition_dropout", 0, 1),
        ("huber_c", 1e-8, 1e3),
        ("checkpointing_steps", 1, 10**7),
        ("checkpoints_total_limit", 1, 10**4),
        ("logging_steps", 1, 10**7),
    ):
        value = getattr(config, name)
        if not low <= value <= high:  # also catches NaN
            raise UserError(f"{name} is {value}; expected a value from {low} to {high}")
    if config.max_relative_delta is not None and not config.max_relative_delta > 0:
        raise UserError(f"max_relative_delta is {config.max_relative_delta}; expected a positive number, such as 0.05")
    if config.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise UserError("report_to is tensorboard, which is not installed; run pip install 'selfnpo[tensorboard]'")
    return config


def to_yaml(config: TrainConfig) -> str:
    """What `--config` reads back."""
    values = {name: value for name, value in asdict(config).items() if name not in _INVOCATION}
    return yaml.safe_dump(values | {"output_dir": str(config.output_dir)}, sort_keys=False)


def binding(config: TrainConfig) -> dict[str, Any]:
    """The settings that a run cannot change without becoming another run."""
    return {name: value for name, value in asdict(config).items() if name not in _FREE_ON_RESUME}
