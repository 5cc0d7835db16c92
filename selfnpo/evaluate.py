"""python -m selfnpo.evaluate: what negative models change on the demo, over a sweep of w, with baselines and errors."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from diffusers import ModelMixin

from selfnpo.cli import as_flags, parse, run
from selfnpo.config import TrainConfig
from selfnpo.demo import report
from selfnpo.demo.base import train_base
from selfnpo.demo.baselines import ShuffledLabels, random_perturbation
from selfnpo.demo.evaluation import CFG, SEEDS, SELF_NPO, Evaluation, evaluate
from selfnpo.demo.metrics import Metrics
from selfnpo.env import installation
from selfnpo.errors import UserError
from selfnpo.files import write_text
from selfnpo.inputs.digits import Split, halves
from selfnpo.models import DEMO, ModelOptions, PretrainedModel, load_negative, load_pretrained
from selfnpo.output import prepare_output
from selfnpo.training.trainer import Trainer

Arm = Literal["self-npo", "fresh", "early", "random", "shuffled"]
RESULTS = ("evaluation.json", "evaluation.md", "precision_recall.png")
EARLY_STEPS = 600  # of the base's 3,000


@dataclass(frozen=True)
class EvaluateConfig:
    """Compare negative models with plain guidance on the embedded demo."""

    output_dir: Path = Path("runs/evaluation")
    """Where the table and the plot are written."""
    overwrite: bool = False
    """Replace the results of an earlier evaluation in output_dir."""
    negative: Path | None = None
    """A trained negative to evaluate; without it one is fine-tuned per seed with the default settings."""
    arms: tuple[Arm, ...] = ("self-npo", "random", "early", "shuffled")
    """Negative models beside no guidance and plain guidance."""
    guidance_scales: tuple[float, ...] = (1.5, 2.0, 3.0)
    """w + 1."""
    num_samples: int = 5000
    """Samples per arm, guidance scale and seed."""
    seeds: tuple[int, ...] = SEEDS
    """One replicate each."""
    pretrained_model_name_or_path: str = DEMO
    """The base model."""
    split: Split = "final"
    """final: judges from half B. development: judges from half A, for a base made with
    python -m selfnpo.demo.base --split development."""


def check(config: EvaluateConfig) -> None:
    if not 200 <= config.num_samples <= 100_000:
        raise UserError(f"num_samples is {config.num_samples}; expected a value from 200 to 100000")
    if not config.guidance_scales or not all(1 < scale <= 100 for scale in config.guidance_scales):
        raise UserError(f"guidance_scales is {config.guidance_scales}; expected values above 1 and up to 100, such as 2 3")
    if config.negative is None and SELF_NPO not in config.arms:
        raise UserError(f"arms is {config.arms}; expected self-npo among them, for it is what the table compares")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or min(config.seeds) < 0:
        raise UserError(f"seeds is {config.seeds}; expected different non-negative integers, such as 20 21 22")


def negatives(config: EvaluateConfig, base: PretrainedModel, given: ModelMixin | None) -> Iterator[dict[str, ModelMixin]]:
    """For each seed its negative models; what needs training is trained when its turn comes."""
    early = train_base(config.split, EARLY_STEPS, seed=0) if "early" in config.arms else None
    digits, _ = halves(config.split)
    for seed in config.seeds:
        settings = TrainConfig(seed=seed)
        models = {SELF_NPO: given or fine_tune(settings, base)}
        for arm in config.arms:
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


def command(config: EvaluateConfig) -> str:
    """The command line that means `config`."""
    changed = (field.name for field in fields(config) if getattr(config, field.name) != field.default)
    flags = as_flags({name: getattr(config, name) for name in changed if name not in ("output_dir", "overwrite")})
    return shlex.join(("python", "-m", "selfnpo.evaluate", *flags))


def save(config: EvaluateConfig, evaluation: Evaluation) -> str:
    """Write JSON, Markdown and plot; returns the Markdown."""
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
            f"Made with `{command(config)}` on {installation()['cpu']}, torch {torch.__version__}.\n",
        )
    )
    write_text(output_dir / "evaluation.md", text)
    content = {"command": command(config), "environment": installation()} | asdict(evaluation)
    write_text(output_dir / "evaluation.json", json.dumps(content, indent=1))
    report.save_precision_recall(evaluation, output_dir / "precision_recall.png")
    return text


def main(config: EvaluateConfig) -> None:
    check(config)
    base = load_pretrained(ModelOptions(config.pretrained_model_name_or_path))
    given = load_negative(config.negative, base) if config.negative else None
    prepare_output(config.output_dir, RESULTS, config.overwrite)
    _, held_out = halves(config.split)
    models = negatives(config, base, given)
    evaluation = evaluate(base, Metrics(held_out), models, config.seeds, config.guidance_scales, config.num_samples)
    print(save(config, evaluation))
    print(f"written to {config.output_dir}")


if __name__ == "__main__":
    run(lambda: main(parse(EvaluateConfig)))
