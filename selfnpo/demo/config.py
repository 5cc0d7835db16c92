"""The settings of `python -m selfnpo.evaluate`, and the names of the methods that it compares."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from selfnpo.cli import as_flags
from selfnpo.config import TrainConfig
from selfnpo.errors import UserError
from selfnpo.options import DEMO, Split, changed

NONE, CFG, SELF_NPO = "none", "cfg", "self-npo"  # arms
SEEDS = (20, 21, 22, 23, 24, 25)  # used for reports; settings were chosen with other seeds
Arm = Literal["self-npo", "fresh", "early", "random", "shuffled"]
ARMS: tuple[Arm, ...] = ("self-npo", "random", "early", "shuffled")
FINE_TUNED = ("self-npo", "fresh", "shuffled")  # arms that are trained for each seed
EARLY_STEPS = 600  # of the base's 3,000


@dataclass(frozen=True)
class EvaluateConfig:
    """Compare negative models with plain guidance on the embedded demo."""

    output_dir: Path = Path("runs/evaluation")
    """Folder for the table and the plot."""
    overwrite: bool = False
    """Replace the results of an earlier evaluation in output_dir."""
    negative: Path | None = None
    """A trained negative for the demo. By default one is fine-tuned per seed, with the default settings."""
    arms: tuple[Arm, ...] | None = None
    """Negatives to compare with no guidance and plain guidance. By default self-npo random early shuffled, or only the one
    given by --negative."""
    guidance_scales: tuple[float, ...] = (1.5, 2.0, 3.0)
    """Guidance scales as in diffusers, where 1 means no guidance."""
    num_samples: int = 5000
    """Samples per arm, guidance scale and seed."""
    seeds: tuple[int, ...] = SEEDS
    """Seeds of the replicates, one each."""
    pretrained_model_name_or_path: str = DEMO
    """The base model: demo, or one made with python -m selfnpo.demo.base."""
    split: Split = "final"
    """final: judges trained on half B. development: judges trained on half A, for a base made with
    python -m selfnpo.demo.base --split development."""

    @property
    def baselines(self) -> tuple[Arm, ...]:
        """The negatives other than the main one."""
        arms = self.arms if self.arms is not None else () if self.negative else ARMS
        return tuple(arm for arm in dict.fromkeys(arms) if arm != SELF_NPO)


def check(config: EvaluateConfig) -> None:
    if not 200 <= config.num_samples <= 100_000:
        raise UserError(f"num_samples is {config.num_samples}; expected a value from 200 to 100000")
    if not config.guidance_scales or not all(1 < scale <= 100 for scale in config.guidance_scales):
        raise UserError(f"guidance_scales is {config.guidance_scales}; expected values above 1 and up to 100, such as 2 3")
    if config.arms is not None and len(set(config.arms)) < len(config.arms):
        raise UserError(f"arms is {' '.join(config.arms)}; expected different arms")
    if config.negative is None and config.arms is not None and SELF_NPO not in config.arms:
        raise UserError(
            f"arms is {config.arms}; expected self-npo among them, because the table compares it with the others"
        )
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or min(config.seeds) < 0:
        raise UserError(f"seeds is {config.seeds}; expected different non-negative integers, such as 20 21 22")


def command_line(config: EvaluateConfig) -> str:
    """The command line for `config`."""
    flags = {name: value for name, value in changed(config).items() if name not in ("output_dir", "overwrite")}
    return shlex.join(("python", "-m", "selfnpo.evaluate", *as_flags(flags)))


def plan(config: EvaluateConfig) -> str:
    """A message that says what will be trained and judged."""
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
