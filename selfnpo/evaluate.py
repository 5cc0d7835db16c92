"""python -m selfnpo.evaluate: the effect of negatives on the demo, by guidance scale, with baselines and intervals."""

from collections.abc import Sequence

from selfnpo.cli import parse, run
from selfnpo.demo.config import EvaluateConfig, check, plan
from selfnpo.models import Source
from selfnpo.models.origin import check_exists
from selfnpo.options import ModelOptions
from selfnpo.output import check_output, prepare_output

RESULTS = ("evaluation.json", "evaluation.md", "precision_recall.png")


def main(config: EvaluateConfig) -> None:
    check(config)
    check_output(config.output_dir, config.overwrite)
    options = ModelOptions(config.pretrained_model_name_or_path)
    if config.negative is not None:
        check_exists(str(config.negative), options)
    print("loading PyTorch and diffusers")
    source = Source(options)
    from selfnpo.demo.evaluation import evaluate  # imported here so that mistakes are reported before PyTorch loads
    from selfnpo.demo.experiment import check_digits, negatives, save
    from selfnpo.demo.metrics import Metrics
    from selfnpo.inputs.digits import halves
    from selfnpo.models import check_negative, load_negative, load_pretrained

    check_digits(source)
    if config.negative is not None:
        check_negative(config.negative, source)
    base = load_pretrained(source.options)
    given = load_negative(config.negative, base) if config.negative else None
    prepare_output(config.output_dir, RESULTS, config.overwrite)
    print(plan(config))
    _, held_out = halves(config.split)
    models = negatives(config, base, given)
    evaluation = evaluate(base, Metrics(held_out), models, config.seeds, config.guidance_scales, config.num_samples)
    print(save(config, evaluation))
    print(f"written to {config.output_dir}")


def command(args: Sequence[str] | None = None) -> None:
    main(parse(EvaluateConfig, args))


if __name__ == "__main__":
    run(command)
