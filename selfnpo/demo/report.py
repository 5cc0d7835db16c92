"""What an evaluation says, as a table, in sentences and as a picture."""

from pathlib import Path

import matplotlib.pyplot as plt

from selfnpo.demo.evaluation import CFG, NONE, SELF_NPO, Estimate, Evaluation
from selfnpo.demo.metrics import HIGHER_IS_BETTER, METRICS
from selfnpo.sampling.picture import save_figure

LABELS = {
    NONE: "no guidance",
    CFG: "plain guidance (CFG)",
    SELF_NPO: "Self-NPO",
    "fresh": "Self-NPO, fresh rollouts",
    "early": "early checkpoint of the base",
    "random": "random perturbation of equal norm",
    "shuffled": "fine-tuned on shuffled labels",
}
CERTAIN = 3  # standard errors

CAVEATS = """\
`fd` and `nn` are better when lower, the others when higher. Read `nn`, `precision` and `density` (faithfulness) together
with `recall` and `coverage` (variety): a model that repeats a few perfect digits wins the former and loses the latter.
These are 8x8 digits and a model of 436 thousand parameters: evidence that the machinery works, none about large models.
The baselines `early` and `shuffled` are weaker models that no rollout made; where they gain as much, the gain comes from
having a weaker model as the negative, not from truncated rollouts as such.
"""


def _number(estimate: Estimate, sign: bool = False) -> str:
    digits = 2 if abs(estimate.mean) >= 10 else 3
    text = f"{estimate.mean:+.{digits}f}" if sign else f"{estimate.mean:.{digits}f}"
    return text if estimate.error != estimate.error else f"{text} ± {estimate.error:.{digits}f}"


def table(evaluation: Evaluation) -> str:
    """Every arm at every w, mean ± standard error over replicates."""
    lines = ["| negative model | w | " + " | ".join(METRICS) + " |", "| --- " * (len(METRICS) + 2) + "|"]
    for arm, by_scale in evaluation.values.items():
        for scale in by_scale:
            cells = [_number(evaluation.estimate(arm, scale, metric)) for metric in METRICS]
            lines.append(f"| {LABELS[arm]} | {scale - 1:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference_table(evaluation: Evaluation, baseline: str = CFG, brief: bool = False) -> str:
    """Self-NPO minus `baseline` at equal w, noise and labels: mean ± standard error and 95 % interval; or without intervals
    and with losses in bold."""
    lines = [f"| Self-NPO minus {LABELS[baseline]} | " + " | ".join(METRICS) + " |", "| --- " * (len(METRICS) + 1) + "|"]
    for scale in evaluation.guidance_scales:
        cells = []
        for metric in METRICS:
            d = evaluation.difference(SELF_NPO, scale, metric, baseline)
            number = _number(d, sign=True)
            if not brief:
                cells.append(f"{number} [{d.mean - d.half_width:+.3f}, {d.mean + d.half_width:+.3f}]")
            else:
                cells.append(f"**{number}**" if _wins(d, metric) is False else number)
        lines.append(f"| w = {scale - 1:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _wins(difference: Estimate, metric: str) -> bool | None:
    """None where it is not decided."""
    if not abs(difference.mean) > CERTAIN * difference.error:
        return None
    return (difference.mean > 0) == HIGHER_IS_BETTER[metric]


def verdict(evaluation: Evaluation) -> str:
    """In sentences: where Self-NPO wins against plain guidance, where it loses, and what is not decided."""
    sentences = []
    for scale in evaluation.guidance_scales:
        better, worse, undecided = [], [], []
        for metric in METRICS:
            d = evaluation.difference(SELF_NPO, scale, metric)
            wins = _wins(d, metric)
            if wins is None:
                undecided.append(metric)
            else:
                (better if wins else worse).append(f"{metric} ({_number(d, sign=True)})")
        sentences.append(
            f"- **w = {scale - 1:g}**: Self-NPO wins in {', '.join(better) or 'nothing'}; "
            f"loses in {', '.join(worse) or 'nothing'}; not decided: {', '.join(undecided) or 'nothing'}."
        )
    return "\n".join(sentences)


def best(evaluation: Evaluation) -> str:
    """Each method at its own best w, for the question whether it is worth having at all."""
    choices = []
    for metric in METRICS:
        means = {
            (arm, scale): evaluation.estimate(arm, scale, metric).mean
            for arm in (NONE, CFG, SELF_NPO)
            for scale in evaluation.values.get(arm, {})
        }
        arm, scale = (max if HIGHER_IS_BETTER[metric] else min)(means, key=means.get)
        guided = "" if arm == NONE else f" at w = {scale - 1:g}"
        choices.append(f"{metric}: {LABELS[arm]}{guided} ({means[arm, scale]:.3f})")
    return f"Best of no guidance, CFG and Self-NPO over all w measured here: {'; '.join(choices)}."


def explain(evaluation: Evaluation, one_negative: bool) -> str:
    """How the numbers were made; `one_negative` says that no replicate trained its own."""
    return (
        f"{evaluation.num_samples} samples per arm and w, {len(evaluation.seeds)} replicates (seeds "
        f"{', '.join(map(str, evaluation.seeds))}), mean ± standard error over replicates; in brackets the 95 % interval. "
        + (
            "All replicates use one negative model, so the errors hold the noise of sampling but not that of training. "
            if one_negative
            else "Every replicate fine-tunes its own negative models and draws its own noise, which all its arms share. "
        )
        + f"A win or loss is a paired difference beyond {CERTAIN} standard errors."
    )


def panel_title(evaluation: Evaluation, arm: str, scale: float) -> str:
    """A method and what it reached, for the title of its picture."""
    fd, precision, recall = (evaluation.estimate(arm, scale, metric).mean for metric in ("fd", "precision", "recall"))
    guided = "" if arm == NONE else f", w = {scale - 1:g}"
    return f"{LABELS[arm]}{guided}\nFD {fd:.1f}, precision {precision:.2f}, recall {recall:.2f}"


def save_precision_recall(evaluation: Evaluation, path: Path) -> None:
    """Precision over recall, one line per negative model along w."""
    figure, axis = plt.subplots(figsize=(7, 5.2), layout="constrained")
    for arm, by_scale in evaluation.values.items():
        recall, precision = (
            [evaluation.estimate(arm, scale, metric).mean for scale in by_scale] for metric in ("recall", "precision")
        )
        axis.plot(recall, precision, "o-", label=LABELS[arm], linewidth=2.4 if arm == SELF_NPO else 1.4)
        for scale, x, y in zip(by_scale, recall, precision, strict=True):
            axis.annotate(f"{scale - 1:g}", (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
    axis.set_xlabel("recall: variety")
    axis.set_ylabel("precision: faithfulness")
    axis.set_title("Guidance weight w trades variety for faithfulness (numbers: w)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    save_figure(figure, path)
