"""What a finished run leaves behind: the negative model, its cost, and for the demo what it changed."""

import json
from pathlib import Path
from typing import Any

import torch

from selfnpo.checkpoint import committed_folder, write_text
from selfnpo.env import device_name
from selfnpo.lora_files import model_spec, save_lora
from selfnpo.meter import Flops, Meter, cost_of_compute, matmul_peak, predicted, step_flops
from selfnpo.model_card import model_card
from selfnpo.picture import save_comparison
from selfnpo.sampling import ddim_sample, start_noise
from selfnpo.state import TrainState
from selfnpo.student import LowRank
from selfnpo.world import report
from selfnpo.world.data import halves
from selfnpo.world.evaluation import CFG, NONE, SEEDS, SELF_NPO, evaluate
from selfnpo.world.metrics import Metrics

RESULTS = ("negative", "config.yaml", "metrics.json", "log.jsonl", "comparison.png", "report.md", "samples", "tensorboard")
KOHYA_FILE = "negative_kohya.safetensors"


def save_negative(state: TrainState, status: str) -> Path:
    """The student in `output_dir`/negative, with a model card: a diffusers model folder, or LoRA files where diffusers reads
    LoRAs for the family."""
    folder = state.config.output_dir / "negative"
    with committed_folder(folder) as partial:
        is_lora = isinstance(state.student, LowRank) and hasattr(state.base.family.pipeline_class, "load_lora_weights")
        if is_lora:
            _save_lora(partial, state)
        else:
            state.student.merged().save_pretrained(partial)
        (partial / "README.md").write_text(_card(state, status))
    return folder


def _save_lora(folder: Path, state: TrainState) -> None:
    config, family = state.config, state.base.family
    title = f"Self-NPO negative for {config.pretrained_model_name_or_path}"
    metadata = model_spec(f"{family.architecture}/lora", title, description="For the negative branch of guidance.")
    metadata |= {
        "ss_base_model_version": family.base_model_version,
        "ss_sd_model_name": config.pretrained_model_name_or_path,
        "ss_output_name": config.output_dir.name,
        "ss_learning_rate": str(config.learning_rate),
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_steps": str(state.step),
        "ss_max_train_steps": str(config.max_train_steps),
        "ss_batch_size_per_device": str(config.train_batch_size),
        "ss_gradient_accumulation_steps": str(config.gradient_accumulation_steps),
        "ss_mixed_precision": config.mixed_precision,
        "ss_seed": str(config.seed),
    }
    student = state.student
    kohya_name = KOHYA_FILE if family.base_model_version else ""
    save_lora(
        folder, student.state_dict(), student.lora, component=family.component, kohya_name=kohya_name, metadata=metadata
    )


def _card(state: TrainState, status: str, quality: dict[str, Any] | None = None) -> str:
    return model_card(state.config, state.base.family, training_cost(state), status, quality)


def training_cost(state: TrainState) -> dict[str, Any]:
    samples = state.step * state.config.total_batch_size
    return {
        "steps": state.step,
        "samples": samples,
        "seconds": state.seconds,
        "startup_seconds": state.startup_seconds,
        "samples_per_second": samples / state.seconds,
        "reference_evaluations_per_sample": state.reference_evaluations / samples,
        "strategy": state.strategy,
        "relative_delta": state.relative_delta(),
        "beside_steps_seconds": {**state.beside},
        "device": f"{device_name(state.base.device)}, torch {torch.__version__}",
    }


def beside_steps(state: TrainState) -> str:
    """A line on what held the steps of the run up, in shares of its time."""
    whole = state.seconds + state.startup_seconds + state.beside["pictures"]
    shares = ", ".join(f"{kind} {100 * seconds / whole:.1f} %" for kind, seconds in state.beside.items())
    return f"beside the steps: {shares} of {whole:.0f} s"


def compute_cost(state: TrainState, meter: Meter, flops: Flops) -> dict[str, Any]:
    """What meter and counted FLOPs say of the run so far; the hours hold everything that training took."""
    config, device = state.config, state.base.device
    evaluations = state.reference_evaluations / (state.step * config.total_batch_size)
    per_step = step_flops(config, flops, evaluations)
    found = cost_of_compute(
        device, state.seconds + state.startup_seconds, state.step * per_step, matmul_peak(device, state.base.dtype)
    )
    found |= meter.report() | {"counted_tflop_per_step": per_step / 1e12}
    if device.type != "cuda" and not state.base.source.is_demo:  # on which no GPU would be busy
        found["predicted_gpu_hours"] = predicted(config.max_train_steps * per_step)
    return found


def save_metrics(
    state: TrainState, status: str, compute: dict[str, Any], quality: dict[str, Any] | None = None
) -> dict[str, Any]:
    """metrics.json; without `quality` the samples were not judged. Returns the cost."""
    cost = training_cost(state) | compute
    write_text(
        state.config.output_dir / "metrics.json", json.dumps({"status": status, "cost": cost, "quality": quality}, indent=1)
    )
    return cost


def demo_report(state: TrainState, status: str, compute: dict[str, Any]) -> str:
    """Sample with and without the negative, judge both, and write comparison.png, report.md and the quality in metrics.json.

    Returns the verdict in sentences.
    """
    output_dir, base = state.config.output_dir, state.base
    _, held_out = halves()
    evaluation = evaluate(
        base,
        Metrics(held_out),
        [{SELF_NPO: state.model}] * len(SEEDS),
        SEEDS,
        guidance_scales=(2.0, 3.0),
        num_samples=2000,
    )
    labels = torch.arange(60) % base.num_conditions
    noise = start_noise(base, len(labels), state.config.seed)
    real = torch.stack([held_out.images[held_out.labels == label][:6] for label in range(10)], dim=1).flatten(0, 1)
    panels = [("real digits, held out", real)]
    for arm, scale, negative in ((NONE, 1.0, None), (CFG, 3.0, None), (SELF_NPO, 3.0, state.model)):
        title = report.panel_title(evaluation, arm, scale)
        panels.append((title, ddim_sample(base, noise, labels, scale, negative)))
    caption = "equal positions of the generated digits start from equal noise; columns ask for 0 to 9"
    save_comparison(output_dir / "comparison.png", panels, base.num_conditions, caption)
    verdict = report.verdict(evaluation)
    save_metrics(state, status, compute, evaluation.values)
    write_text(output_dir / "negative" / "README.md", _card(state, status, evaluation.values))
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
