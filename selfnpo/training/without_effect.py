"""Refuse settings that would have no effect, so that no flag is silently ignored."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from selfnpo.config import PRESETS, TrainConfig, preset_config
from selfnpo.errors import UserError
from selfnpo.models import NOT_THE_DEMO, Source
from selfnpo.options import DEMO, NONE


class Rule(NamedTuple):
    names: tuple[str, ...]
    acts: Callable[[TrainConfig, Source], Any]  # whether they have an effect in this run
    advice: str  # what uses them, and how to fix it


# These depend on nothing in the model's files, and on no setting with a default of its own in some family.
AMONG_SETTINGS = (
    Rule(
        ("prompts", "prompt_dataset", "train_data_dir"), lambda c, _: c.pretrained_model_name_or_path != DEMO, NOT_THE_DEMO
    ),
    Rule(("num_rollout_steps",), lambda c, _: c.rollout == "data", "only --rollout data uses it; add that or leave it out"),
    Rule(("pool_size",), lambda c, _: c.rollout == "pool", "only --rollout pool uses it; add that or leave it out"),
    Rule(("huber_c",), lambda c, _: c.loss == "huber", "only --loss huber uses it; add that or leave it out"),
    Rule(
        ("lora_alpha", "lora_target_modules"),
        lambda c, _: c.rank,
        "only a LoRA uses it; add --rank, such as 16, or leave it out",
    ),
    Rule(
        ("checkpointing_minutes",),
        lambda c, _: not c.checkpointing_steps,
        "--checkpointing_steps replaces it; leave one of the two out",
    ),
    Rule(
        ("logging_dir",),
        lambda c, _: c.report_to == "tensorboard",
        "only --report_to tensorboard uses it; add that or leave it out",
    ),
    Rule(("hub_model_id",), lambda c, _: c.push_to_hub, "only --push_to_hub uses it; add that or leave it out"),
    Rule(
        ("overwrite",),
        lambda c, _: c.resume_from_checkpoint is None,
        "a resumed run replaces nothing; leave --overwrite or --resume_from_checkpoint out",
    ),
    Rule(
        ("validation_prompt", "num_validation_images", "validation_guidance_scale"),
        lambda c, _: c.validation_steps or c.pretrained_model_name_or_path != DEMO,
        "the demo makes its own comparison at the end; add --validation_steps, such as 500, or leave it out",
    ),
)
RULES = (
    *AMONG_SETTINGS,
    Rule(
        ("prompts", "prompt_dataset"),
        lambda _, source: source.family.takes_prompts,
        "the model takes no prompts; leave it out",
    ),
    Rule(
        ("lr_warmup_steps",),
        lambda c, _: c.lr_scheduler != "constant" or not c.lr_warmup_steps,
        "--lr_scheduler constant has no warmup; choose constant_with_warmup, linear or cosine, or leave it out",
    ),
    Rule(
        ("condition_dropout", "rollout_guidance_scale"),
        lambda c, source: _has_conditions(c, source),
        "this run only has the null condition; pass prompts (for a model that uses them), or leave it out",
    ),
    Rule(
        ("prompts", "prompt_dataset"),
        lambda c, _: c.condition_dropout < 1 or c.rollout_guidance_scale != 0,
        "with --condition_dropout 1 and --rollout_guidance_scale 0 no prompt is used; change one of them, or leave it out",
    ),
)


def _has_conditions(config: TrainConfig, source: Source) -> bool:
    """Whether any condition can differ from the null condition."""
    family = source.family
    if not family.takes_prompts:
        return bool(family.classes(source.config))
    given = config.prompts != NONE or config.prompt_dataset is not None or config.train_data_dir is not None
    return given or not family.null_is_empty_prompt


def check_effect(config: TrainConfig, source: Source | None) -> None:
    """Refuse a setting that the user changed but the run would not use. Without a model, only AMONG_SETTINGS are checked.

    A config.yaml contains every setting of the run that wrote it, including its preset's values. So with --config, a value
    from any preset counts as unchanged.

    Raises:
        UserError: for the first such setting.
    """
    presets = PRESETS if config.config else [config.preset]
    of_family = source.family.presets if source else None
    usual = [preset_config(name, of_family, config.rank > 0) for name in presets]
    for rule in RULES if source else AMONG_SETTINGS:
        for name in _changed(config, usual, rule.names):
            if not rule.acts(config, source):
                raise UserError(f"{name} is {_text(getattr(config, name))}, but {rule.advice}")


def _changed(config: TrainConfig, usual: list[TrainConfig], names: Iterable[str]) -> list[str]:
    return [name for name in names if all(getattr(config, name) != getattr(each, name) for each in usual)]


def _text(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)
