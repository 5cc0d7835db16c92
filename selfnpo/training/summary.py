"""A summary of a run before it starts: the values that result from preset, model, file and flags."""

from selfnpo.config import TrainConfig
from selfnpo.inputs.data import TrainData
from selfnpo.models import Source

_ROLLOUTS = {
    "pool": "{} batches of trajectories, which take turns at one step each",
    "fresh": "from noise to a random time",
    "full": "from noise to a clean sample",
    "data": "{} steps from noised images",
}


def summary(config: TrainConfig, source: Source, data: TrainData) -> str:
    """One line per part of the run: what is trained, on what, how, for how long, and where the results go."""
    rows = {
        "model": f"{source.name} ({source.family.name}), preset {config.preset}",
        "trains": f"a LoRA of rank {config.rank}" if config.rank else "all weights",
        "on": _conditions(source, data),
        "rollouts": f"{config.rollout}: {_rollout(config)}",
        "reference": _reference(config),
        "loss": _loss(config),
        "optimizer": _optimizer(config),
        "steps": _steps(config),
        "results": str(config.output_dir),
    }
    return "\n".join(f"{name:<10} {text}" for name, text in rows.items())


def _conditions(source: Source, data: TrainData) -> str:
    images = f"{_count(len(data.files), 'image')}, with " if data.files else ""
    if classes := source.family.classes(source.config):
        return f"{images}{len(next(iter(classes.values()))) - 1} classes"
    if not source.family.takes_prompts:
        return f"{images}no conditions"
    return images + ("only the empty prompt" if data.prompts == [""] else _count(len(data.prompts), "prompt"))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def _rollout(config: TrainConfig) -> str:
    number = config.pool_size if config.rollout == "pool" else config.num_rollout_steps
    scale = config.rollout_guidance_scale
    guidance = {0: "unconditional", 1: "conditional"}.get(scale, f"guidance scale {scale:g}")
    return f"{_ROLLOUTS[config.rollout].format(number)}; grid of {config.num_inference_steps} points, {guidance}"


def _reference(config: TrainConfig) -> str:
    decay = config.reference_decay
    return f"moving average of the student, decay {decay:g}" if decay < 1 else "the frozen base"


def _loss(config: TrainConfig) -> str:
    kind = {"l2": "L2", "huber": f"pseudo-Huber, c {config.huber_c:g}"}[config.loss]
    return f"{kind}, weighted as {config.loss_weighting}; {100 * config.condition_dropout:g} % of the conditions dropped"


def _optimizer(config: TrainConfig) -> str:
    warmup = f" after {config.lr_warmup_steps} steps of warmup" if _warms_up(config) else ""
    kind = "8-bit AdamW" if config.use_8bit_adam else "AdamW"
    return (
        f"{kind}, learning rate {config.learning_rate:g}, {config.lr_scheduler}{warmup}; weight decay "
        f"{config.adam_weight_decay:g}, gradient norm at most {config.max_grad_norm:g}"
    )


def _warms_up(config: TrainConfig) -> bool:
    return config.lr_scheduler != "constant" and config.lr_warmup_steps > 0


def _steps(config: TrainConfig) -> str:
    parts = config.gradient_accumulation_steps
    split = f" ({parts} x {config.train_batch_size})" if parts > 1 else ""
    precision = {"no": "float32"}.get(config.mixed_precision, config.mixed_precision)
    checkpointed = ", gradients checkpointed" if config.gradient_checkpointing or config.low_vram else ""
    until = ""
    if config.max_relative_delta is not None:
        until = f", or until the weights have moved by {100 * config.max_relative_delta:g} %"
    return f"{config.max_train_steps:,} of {config.total_batch_size} samples{split} in {precision}{checkpointed}{until}"
