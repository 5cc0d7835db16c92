"""python -m selfnpo.evaluate: what negative models change on the demo, over guidance scales, with baselines and errors."""

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
from selfnpo.demo.evaluation import CFG, NONE, SEEDS, SELF_NPO, Evaluation, evaluate
from selfnpo.demo.metrics import Metrics
from selfnpo.env import installation
from selfnpo.errors import UserError
from selfnpo.files import write_text
from selfnpo.inputs.digits import Split, halves
from selfnpo.models import DEMO, ModelOptions, PretrainedModel, Source, check_negative, load_negative, load_pretrained
from selfnpo.output import check_output, prepare_output
from selfnpo.training.trainer import Trainer

Arm = Literal["self-npo", "fresh", "early", "random", "shuffled"]
ARMS: tuple[Arm, ...] = ("self-npo", "random", "early", "shuffled")
RESULTS = ("evaluation.json", "evaluation.md", "precision_recall.png")
EARLY_STEPS = 600  # of the base's 3,000
FINE_TUNED = ("self-npo", "fresh", "shuffled")  # arms that are trained anew for each seed
DIGITS = ("in_channels", "sample_size", "num_embeds_ada_norm")  # the configuration of a base that makes digits


@dataclass(frozen=True)
class EvaluateConfig:
    """Compare negative models with plain guidance on the embedded demo."""

    output_dir: Path = Path("runs/evaluation")
    """Where the table and the plot are written."""
    overwrite: bool = False
    """Replace the results of an earlier evaluation in output_dir."""
    negative: Path | None = None
    """A trained negative of the demo to evaluate; without it one is fine-tuned per seed with the default settings."""
    arms: tuple[Arm, ...] | None = None
    """Negative models beside no guidance and plain guidance. By default self-npo random early shuffled; with --negative that
    one alone, without baselines."""
    guidance_scales: tuple[float, ...] = (1.5, 2.0, 3.0)
    """Guidance scales as in diffusers, where 1 means no guidance."""
    num_samples: int = 5000
    """Samples per arm, guidance scale and seed."""
    seeds: tuple[int, ...] = SEEDS
    """One replicate each."""
    pretrained_model_name_or_path: str = DEMO
    """The base model: the demo's, or one made with python -m selfnpo.demo.base."""
    split: Split = "final"
    """final: judges from half B. development: judges from half A, for a base made with
    python -m selfnpo.demo.base --split development."""

    @property
    def baselines(self) -> tuple[Arm, ...]:
        """The negative models beside the one that is judged."""
        arms = self.arms if self.arms is not None else () if self.negative else ARMS
        return tuple(arm for arm in dict.fromkeys(arms) if arm != SELF_NPO)


def check(config: EvaluateConfig) -> None:
    if not 200 <= config.num_samples <= 100_000:
        raise UserError(f"num_samples is {config.num_samples}; expected a value from 200 to 100000")
    if not config.guidance_scales or not all(1 < scale <= 100 for scale in config.guidance_scales):
        raise UserError(f"guidance_scales is {config.guidance_scales}; expected values above 1 and up to 100, such as 2 3")
    if config.negative is None and config.arms is not None and SELF_NPO not in config.arms:
        raise UserError(f"arms is {config.arms}; expected self-npo among them, for it is what the table compares")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or min(config.seeds) < 0:
        raise UserError(f"seeds is {config.seeds}; expected different non-negative integers, such as 20 21 22")


def negatives(config: EvaluateConfig, base: PretrainedModel, given: ModelMixin | None) -> Iterator[dict[str, ModelMixin]]:
    """For each seed its negative models; what needs training is trained when its turn comes."""
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


def check_digits(source: Source) -> None:
    """Raise a UserError for a base that makes anything else than the digits that the judges know."""
    expected = Source(ModelOptions(DEMO))
    if source.family.name != expected.family.name or any(source.config[name] != expected.config[name] for name in DIGITS):
        name = source.options.pretrained_model_name_or_path
        raise UserError(
            f"{name} is a {source.family.name} model that makes other images than the demo's digits, which evaluate judges; "
            "expected the demo, or a base made with python -m selfnpo.demo.base (for other models write images with "
            "python -m selfnpo.sample --output_dir, and score them with your own metrics)"
        )


def plan(config: EvaluateConfig) -> str:
    """What will be trained and judged."""
    steps, batch = TrainConfig().max_train_steps, TrainConfig().train_batch_size
    seeds, scales = len(config.seeds), len(config.guidance_scales)
    tuned = [arm for arm in (SELF_NPO, *config.baselines) if arm in FINE_TUNED and not (arm == SELF_NPO and config.negative)]
    trained = [f"{seeds * len(tuned)} fine-tunes of {steps} steps x {batch} samples ({', '.join(tuned)})"] if tuned else []
    trained += [f"1 early base of {EARLY_STEPS} steps"] if "early" in config.baselines else []
    sets = seeds * (1 + scales * (2 + len(config.baselines)))
    compared = ", ".join((NONE, CFG, SELF_NPO, *config.baselines))
    return (
        f"to train: {'; '.join(trained) or 'no negative'}; 3 judges\n"
        f"to judge: {sets} sets of {config.num_samples} samples ({compared}; {seeds} seeds, guidance_scale "
        f"{' '.join(f'{scale:g}' for scale in config.guidance_scales)})"
    )


def main(config: EvaluateConfig) -> None:
    check(config)
    source = Source(ModelOptions(config.pretrained_model_name_or_path))
    check_digits(source)
    if config.negative is not None:
        check_negative(config.negative, source)
    check_output(config.output_dir, config.overwrite)
    base = load_pretrained(source.options)
    given = load_negative(config.negative, base) if config.negative else None
    prepare_output(config.output_dir, RESULTS, config.overwrite)
    print(plan(config))
    _, held_out = halves(config.split)
    models = negatives(config, base, given)
    evaluation = evaluate(base, Metrics(held_out), models, config.seeds, config.guidance_scales, config.num_samples)
    print(save(config, evaluation))
    print(f"written to {config.output_dir}")


if __name__ == "__main__":
    run(lambda: main(parse(EvaluateConfig)))
