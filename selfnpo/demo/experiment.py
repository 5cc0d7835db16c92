"""Run an evaluation: make the negative models that it compares, and write its files."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace

import torch
from diffusers import ModelMixin

from selfnpo.config import TrainConfig
from selfnpo.demo import report
from selfnpo.demo.base import train_base
from selfnpo.demo.baselines import ShuffledLabels, random_perturbation
from selfnpo.demo.config import CFG, EARLY_STEPS, SELF_NPO, EvaluateConfig, command_line
from selfnpo.demo.evaluation import Evaluation
from selfnpo.env import installation
from selfnpo.errors import UserError
from selfnpo.files import write_text
from selfnpo.inputs.digits import halves
from selfnpo.models import DEMO, ModelOptions, PretrainedModel, Source
from selfnpo.training.trainer import Trainer

DIGITS = ("in_channels", "sample_size", "num_embeds_ada_norm")  # identify a base that makes digits


def check_digits(source: Source) -> None:
    """Raise a UserError for a base that does not make digits like the demo's, which the judges need."""
    expected = Source(ModelOptions(DEMO))
    if source.family.name != expected.family.name or any(source.config[name] != expected.config[name] for name in DIGITS):
        name = source.options.pretrained_model_name_or_path
        raise UserError(
            f"{name} is a {source.family.name} model that does not make the demo's digits, but evaluate only judges those; "
            "expected the demo, or a base made with python -m selfnpo.demo.base (for other models, write images with "
            "python -m selfnpo.sample --output_dir and score them with your own metrics)"
        )


def negatives(config: EvaluateConfig, base: PretrainedModel, given: ModelMixin | None) -> Iterator[dict[str, ModelMixin]]:
    """Yield the negative models for each seed, and train them when they are needed."""
    early = train_base(config.split, EARLY_STEPS, seed=0) if "early" in config.baselines else None
    digits, _ = halves(config.split)
    for seed in config.seeds:
        settings = TrainConfig(seed=seed)
        models = {SELF_NPO: given or fine_tune(settings, base)}
        for arm in config.baselines:
            if arm == "fresh":
                models[arm] = fine_tune(replace(settings, rollout="fresh"), base)
            elif arm == "early":
                models[arm] = early
            elif arm == "random":
                models[arm] = random_perturbation(base.denoiser, models[SELF_NPO], seed)
            elif arm == "shuffled":
                labels = ShuffledLabels(digits, settings.train_batch_size, seed, settings.num_inference_steps)
                models[arm] = fine_tune(settings, base, labels)
        yield models


def fine_tune(settings: TrainConfig, base: PretrainedModel, rollout: ShuffledLabels | None = None) -> ModelMixin:
    trainer = Trainer(settings, base, rollout=rollout)
    if trainer.run() == "interrupted":
        raise KeyboardInterrupt
    return trainer.state.model


def save(config: EvaluateConfig, evaluation: Evaluation) -> str:
    """Write JSON, Markdown and a plot, and return the Markdown."""
    output_dir = config.output_dir
    text = "\n\n".join(
        (
            "# Negative models on the digits",
            report.explain(evaluation, one_negative=config.negative is not None),
            report.table(evaluation),
            *(report.difference_table(evaluation, arm) for arm in (CFG, "fresh") if arm in evaluation.values),
            report.verdict(evaluation),
            report.best(evaluation),
            report.CAVEATS,
            f"Made with `{command_line(config)}` on {installation()['cpu']}, torch {torch.__version__}.\n",
        )
    )
    write_text(output_dir / "evaluation.md", text)
    content = {"command": command_line(config), "environment": installation()} | asdict(evaluation)
    write_text(output_dir / "evaluation.json", json.dumps(content, indent=1))
    report.save_precision_recall(evaluation, output_dir / "precision_recall.png")
    return text
