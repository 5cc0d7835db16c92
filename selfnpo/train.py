"""python -m selfnpo.train: train a negative model from a diffusion model's own truncated rollouts."""

import signal
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from selfnpo.cli import run
from selfnpo.config import TrainConfig, check_data, parse_config
from selfnpo.inputs.folder import read_folder
from selfnpo.inputs.prompts import read_prompts
from selfnpo.models import Source
from selfnpo.models.origin import check_exists
from selfnpo.options import DEMO, NONE
from selfnpo.output import RESULTS, check_output, prepare_output
from selfnpo.progress import lasting
from selfnpo.training.without_effect import check_effect

if TYPE_CHECKING:
    from selfnpo.training.trainer import Trainer


def main(config: TrainConfig) -> int | None:
    from selfnpo.budget.advice import advised, planned
    from selfnpo.device import default_device, resolve
    from selfnpo.export.hub import create_repo
    from selfnpo.inputs.data import load_base, read_data
    from selfnpo.training.summary import summary
    from selfnpo.training.supported import check_supported
    from selfnpo.training.trainer import Trainer

    config = replace(config, mixed_precision=resolve(config.mixed_precision))
    device, source = default_device(), Source(config)
    check_supported(config, source, device)
    data = read_data(config, source)
    print(summary(config, source, data))
    needs = config, source, len(data.prompts), device
    print(planned(*needs), end="")
    trainer = None
    with advised(*needs, lambda: trainer.last_checkpoint() if trainer else "nothing was written"):
        if config.push_to_hub:
            config = replace(config, hub_model_id=create_repo(config))
        base = load_base(config, data)
        trainer = Trainer(config, base, config.output_dir, data=data)
        prepare_output(config.output_dir, RESULTS, config.overwrite, config.resume_from_checkpoint)
        status = trainer.run(wait=False)
        with trainer.closing():
            return finish(trainer, source, status)


def finish(trainer: "Trainer", source: Source, status: str) -> int | None:
    """Write the results and print where they are. Returns the exit code."""
    import torch

    from selfnpo.budget.cost import cost_lines, count_flops
    from selfnpo.demo.run_report import demo_report
    from selfnpo.export.hub import upload
    from selfnpo.export.negative import add_picture, save_negative
    from selfnpo.export.run_cost import beside_steps, compute_cost, save_metrics, strength_note
    from selfnpo.training.trainer import resume_command

    state, config = trainer.state, trainer.config
    with lasting("counting FLOPs"):
        compute = compute_cost(state, trainer.meter, count_flops(config, source))
    print(cost_lines(save_metrics(state, status, compute)))
    if status == "interrupted":
        print(f"interrupted after step {state.step}; continue with\n  {resume_command(config)}")
        return 128 + signal.SIGINT
    trainer.step.release()
    with lasting("writing the negative"):
        negative = save_negative(state, status)
    print(f"negative model: {negative}")
    if source.is_demo:
        with torch.compiler.set_stance("force_eager"):  # its batch sizes differ from those of training
            print(demo_report(state, status, compute))
    else:
        if picture := trainer.save_grid():
            print(f"samples with plain and with negative guidance: {picture}")
            add_picture(state, status, picture)
        trainer.writer.wait()
        save_metrics(state, status, compute)  # now with the time spent after the last step
    print(beside_steps(state), strength_note(state), sep="\n", end="")
    print(f"all results: {config.output_dir}")
    if config.push_to_hub:
        print(f"uploaded: {upload(config.hub_model_id, negative)}")


def check_early(config: TrainConfig) -> None:
    """Checks that need neither the model nor PyTorch: settings against each other, the output folder and the input files."""
    check_data(config)
    check_output(config.output_dir, config.overwrite, config.resume_from_checkpoint)
    if config.train_data_dir is not None:
        read_folder(config.train_data_dir)
    elif config.prompts != NONE:
        read_prompts(config.prompts, config.prompt_dataset)
    for name in filter(None, (config.denoiser_name_or_path, config.lora_name_or_path)):
        check_exists(name, config)
    check_effect(config, None)
    if config.pretrained_model_name_or_path == DEMO:
        print("no model was given with --pretrained_model_name_or_path, so this trains the embedded demo")
    print("loading PyTorch and diffusers")


def command(args: Sequence[str] | None = None) -> int | None:
    return main(parse_config(args, check_early))


if __name__ == "__main__":
    run(command)
