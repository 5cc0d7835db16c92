"""The report after training on the demo: samples with the negative, their metrics and a verdict."""

from typing import Any

import torch

from selfnpo.demo import report
from selfnpo.demo.config import CFG, NONE, SEEDS, SELF_NPO
from selfnpo.demo.evaluation import evaluate
from selfnpo.demo.metrics import Metrics
from selfnpo.export.negative import add_picture
from selfnpo.export.run_cost import save_metrics, training_cost
from selfnpo.files import write_text
from selfnpo.inputs.digits import halves
from selfnpo.sampling.ddim import ddim_sample, start_noise
from selfnpo.sampling.picture import save_comparison
from selfnpo.training.state import TrainState


def demo_report(state: TrainState, status: str, compute: dict[str, Any]) -> str:
    """Sample with and without the negative, judge both, and write comparison.png, report.md and metrics.json.

    Returns the verdict as text.
    """
    output_dir, base = state.config.output_dir, state.base
    _, held_out = halves()
    evaluation = evaluate(
        base,
        Metrics(held_out),
        [{SELF_NPO: state.model}] * len(SEEDS),
        SEEDS,
        guidance_scales=(2.0, 3.0),
        num_samples=1000,
    )
    labels = torch.arange(60) % base.num_conditions
    noise = start_noise(base, len(labels), state.config.seed)
    real = torch.stack([held_out.images[held_out.labels == label][:6] for label in range(10)], dim=1).flatten(0, 1)
    panels = [("real digits\nfrom the half that the model was not trained on", real)]
    for arm, scale, negative in ((NONE, 1.0, None), (CFG, 3.0, None), (SELF_NPO, 3.0, state.model)):
        title = report.panel_title(evaluation, arm, scale)
        panels.append((title, ddim_sample(base, noise, labels, scale, negative)))
    caption = (
        "Columns are the digits 0 to 9. Generated images in the same position start from the same noise. FD: distance to "
        "real digits, lower is better. Precision: faithfulness, recall: variety, higher is better."
    )
    save_comparison(output_dir / "comparison.png", panels, base.num_conditions, caption, [*map(str, labels.tolist())])
    verdict = report.verdict(evaluation)
    save_metrics(state, status, compute, evaluation.values)
    add_picture(state, status, output_dir / "comparison.png", evaluation.values)
    write_text(
        output_dir / "report.md",
        "\n\n".join(
            (
                "# Self-NPO on the digits",
                _cost_sentence(state, status),
                "![samples](comparison.png)",
                verdict,
                report.explain(evaluation, one_negative=True),
                report.table(evaluation),
                report.difference_table(evaluation),
                report.best(evaluation),
                report.CAVEATS,
            )
        ),
    )
    return verdict


def _cost_sentence(state: TrainState, status: str) -> str:
    spent = training_cost(state)
    return (
        f"Training ended ({status}) after {spent['steps']} steps of {state.config.total_batch_size} samples, "
        f"{spent['seconds']:.1f} s on {spent['device']} ({spent['samples_per_second']:.0f} samples/s), with "
        f"{spent['reference_evaluations_per_sample']:.2f} reference evaluations per sample. It moved the weights by "
        f"{spent['relative_delta']:.2%} of their norm."
    )
