"""python -m selfnpo.train: a negative model from a diffusion model's own truncated rollouts."""

import signal
from dataclasses import replace

import torch

from selfnpo.checkpoint import write_text
from selfnpo.cli import run
from selfnpo.config import TrainConfig, dtype_of, parse_config, to_yaml
from selfnpo.data import TrainData, read_data
from selfnpo.hub import create_repo, upload
from selfnpo.memory import memory_plan, shortage
from selfnpo.models import PretrainedModel, Source, default_device, load_pretrained
from selfnpo.output import check_output, prepare_output
from selfnpo.results import RESULTS, demo_report, save_metrics, save_negative
from selfnpo.schedule import make_grid
from selfnpo.trainer import Trainer


def load_base(config: TrainConfig, data: TrainData) -> PretrainedModel:
    """The base where training wants it: a LoRA shares its weights, full training keeps them on the host beside a GPU."""
    lora, device, dtype = config.rank > 0, default_device(), dtype_of(config.mixed_precision)
    return load_pretrained(
        config,
        config,
        data.prompts,
        config.validation_prompt,
        device=device,
        dtype=dtype,
        weights_device=device if lora else torch.device("cpu"),
        weights_dtype=dtype if lora else torch.float32,
        stream_conditions=config.low_vram,
    )


def main(config: TrainConfig) -> int | None:
    check_output(config.output_dir, config.overwrite, resume=config.resume_from_checkpoint is not None)
    source = Source(config)
    make_grid(source.scheduler, config.num_inference_steps)  # refused before anything lasts
    data = read_data(config, source)
    plan = memory_plan(config, source, len(data.prompts), default_device())
    print(plan, shortage(plan, default_device()), sep="\n", end="")
    base = load_base(config, data)
    if config.push_to_hub:
        config = replace(config, hub_model_id=create_repo(config))
    trainer = Trainer(config, base, config.output_dir, data=data)
    prepare_output(config.output_dir, RESULTS, config.overwrite, resume=config.resume_from_checkpoint is not None)
    write_text(config.output_dir / "config.yaml", to_yaml(config))

    status = trainer.run()
    save_metrics(trainer.state, status)
    if status == "interrupted":
        print(f"interrupted after step {trainer.state.step}; continue with --resume_from_checkpoint latest")
        return 128 + signal.SIGINT
    negative = save_negative(trainer.state, status)
    print(f"negative model: {negative}")
    if source.is_demo:
        print(demo_report(trainer.state, status))
    else:
        print(f"plain samples beside negative-guided ones: {trainer.save_grid()}")
    print(f"all results: {config.output_dir}")
    if config.push_to_hub:
        print(f"uploaded: {upload(config.hub_model_id, negative)}")


if __name__ == "__main__":
    run(lambda: main(parse_config()))
