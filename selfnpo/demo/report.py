"""Report an evaluation as tables, in sentences and as a picture."""

import itertools
from pathlib import Path

import matplotlib.pyplot as plt

from selfnpo.demo.config import CFG, NONE, SELF_NPO
from selfnpo.demo.evaluation import Estimate, Evaluation
from selfnpo.demo.metrics import HIGHER_IS_BETTER, METRICS
from selfnpo.figures import save_figure
from selfnpo.sampling.ddim import title

LABELS = {
    NONE: "no guidance",
    CFG: "plain guidance (CFG)",
    SELF_NPO: "Self-NPO",
    "fresh": "Self-NPO, fresh rollouts",
    "early": "early checkpoint of the base",
    "random": "random perturbation of equal norm",
    "shuffled": "fine-tuned on shuffled labels",
}

CAVEATS = """\
Lower is better for `fd` and `nn`, higher for the others. Read `nn`, `precision` and `density` (faithfulness) together with
`recall` and `coverage` (variety): a model that repeats a few perfect digits wins in the former and loses in the latter.
These are 8x8 digits and a model with 436 thousand parameters. They show that the method is implemented correctly, but say
nothing about large models.
The baselines `early` and `shuffled` are weaker models that were made without rollouts. If they gain as much as Self-NPO, the
gain comes from using a weaker model as the negative, and not from truncated rollouts.
`fd`, `recall` and `coverage` depend on the number of samples, so compare them only for equal numbers.
All replicates share the base, the judges and the real digits (and `early` has only one checkpoint), so the intervals do not
cover another base or other digits.
"""


def _name(arm: str, scale: float) -> str:
    return LABELS[arm] if arm == NONE else title(LABELS[arm], scale)


def table(evaluation: Evaluation) -> str:
    """Every arm at every guidance scale."""
    lines = ["| negative model | guidance_scale | " + " | ".join(METRICS) + " |", "| --- " * (len(METRICS) + 2) + "|"]
    for arm, by_scale in evaluation.values.items():
        for scale in by_scale:
            cells = [f"{evaluation.estimate(arm, scale, metric)}" for metric in METRICS]
            lines.append(f"| {LABELS[arm]} | {scale:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference_table(evaluation: Evaluation, baseline: str = CFG) -> str:
    """Self-NPO minus `baseline` at the same scale, noise and labels: losses in bold, undecided in parentheses."""
    lines = [f"| Self-NPO minus {LABELS[baseline]} | " + " | ".join(METRICS) + " |", "| --- " * (len(METRICS) + 1) + "|"]
    for scale in evaluation.guidance_scales:
        differences = {metric: evaluation.difference(SELF_NPO, scale, metric, baseline) for metric in METRICS}
        marks = {True: "{:+}", False: "**{:+}**", None: "({:+})"}
        cells = [marks[wins(each, metric)].format(each) for metric, each in differences.items()]
        lines.append(f"| guidance_scale = {scale:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def wins(difference: Estimate, metric: str) -> bool | None:
    """Whether Self-NPO wins; None if the printed interval contains 0, so that this is undecided."""
    return None if difference.holds_zero() else (difference.mean > 0) == HIGHER_IS_BETTER[metric]


def verdict(evaluation: Evaluation) -> str:
    """Sentences on where Self-NPO wins against plain guidance, where it loses, and what is undecided."""
    sentences = []
    for scale in evaluation.guidance_scales:
        found: dict[bool | None, list[str]] = {True: [], False: [], None: []}
        for metric in METRICS:
            d = evaluation.difference(SELF_NPO, scale, metric)
            found[wins(d, metric)].append(f"{metric} ({d:+})")
        better, worse, undecided = (", ".join(names) or "nothing" for names in found.values())
        where = f"guidance_scale = {scale:g}"
        sentences.append(f"- **{where}**: Self-NPO wins in {better}; loses in {worse}; undecided: {undecided}.")
    return "\n".join(sentences)


def best(evaluation: Evaluation) -> str:
    """The method and guidance scale with the best mean in each metric, and those that may be equally good."""
    points = [(arm, scale) for arm in (NONE, CFG, SELF_NPO) for scale in evaluation.values[arm]]
    choices = []
    for metric in METRICS:
        means = {point: evaluation.estimate(*point, metric).mean for point in points}
        ranked = sorted(points, key=means.get, reverse=HIGHER_IS_BETTER[metric])
        equal = [point for point in ranked if evaluation.difference(*ranked[0], metric, *point).holds_zero()]
        names = [f"{_name(*point)} ({evaluation.estimate(*point, metric)})" for point in equal]
        choices.append(f"- {metric}: {' or '.join(names) if len(equal) < len(points) else 'undecided'}")
    head = "The best of no guidance, CFG and Self-NPO over all guidance scales, and those that may be equally good:"
    return "\n".join((head, "", *choices))


def explain(evaluation: Evaluation, one_negative: bool) -> str:
    """How the numbers were made. With `one_negative`, all replicates use the same negative."""
    return (
        f"{evaluation.num_samples} samples per method and guidance scale, {len(evaluation.seeds)} replicates (seeds "
        f"{', '.join(map(str, evaluation.seeds))}). Mean ± half the width of its 95 % interval (Student's t over the "
        "replicates; with a single replicate there is no interval, and nothing is decided). "
        + (
            "All replicates use the same negative model, so the intervals cover the noise of sampling but not of training. "
            if one_negative
            else "Every replicate fine-tunes its own negative models and draws its own noise, which its methods share. "
        )
        + "Differences are paired by replicate. Self-NPO wins or loses if the printed interval does not contain 0. "
        "In tables of differences, losses are bold and undecided differences are in parentheses. Such a table has "
        f"{len(evaluation.guidance_scales) * len(METRICS)} differences. A difference that is really 0 is called a win or a "
        "loss by chance in one case out of twenty."
    )


def panel_title(evaluation: Evaluation, arm: str, scale: float) -> str:
    """The title of a picture: a method and its metrics."""
    fd, precision, recall = (evaluation.estimate(arm, scale, metric).mean for metric in ("fd", "precision", "recall"))
    return f"{_name(arm, scale)}\nFD {fd:.1f}, precision {precision:.2f}, recall {recall:.2f}"


def save_precision_recall(evaluation: Evaluation, path: Path) -> None:
    """Plot precision over recall, with one line per negative model along the guidance scale."""
    figure, axis = plt.subplots(figsize=(10, 5.2), layout="constrained")
    scales = [1.0, *evaluation.guidance_scales]
    shapes = dict(zip(scales, itertools.cycle("Dos^vPX"), strict=False))
    for arm, by_scale in evaluation.values.items():
        recall, precision = (
            [evaluation.estimate(arm, scale, metric).mean for scale in by_scale] for metric in ("recall", "precision")
        )
        # Fresh rollouts coincide with Self-NPO's own line.
        style = {SELF_NPO: {"linewidth": 4, "alpha": 0.6}, "fresh": {"linestyle": "--", "zorder": 3}}.get(arm, {})
        (line,) = axis.plot(recall, precision, label=LABELS[arm] if arm != NONE else "_", **style)
        for scale, x, y in zip(by_scale, recall, precision, strict=True):
            color = "black" if arm == NONE else line.get_color()
            axis.plot(x, y, shapes[scale], color=color, markersize=9 if arm == SELF_NPO else 6)
    axis.set_xlabel("recall: variety")
    axis.set_ylabel("precision: faithfulness")
    axis.set_title("Guidance trades variety for faithfulness: up and to the right is better")
    axis.grid(alpha=0.3)
    figure.legend(fontsize=9, loc="outside right upper", title="negative model")
    handles = [plt.Line2D([], [], marker=shapes[scale], color="black", linestyle="") for scale in scales]
    names = [LABELS[NONE] if scale == 1 else f"guidance_scale = {scale:g}" for scale in scales]
    figure.legend(handles, names, fontsize=9, loc="outside right lower")
    save_figure(figure, path)
