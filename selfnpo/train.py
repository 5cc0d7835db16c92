"""python -m selfnpo.train: a negative model from a diffusion model's own truncated rollouts."""

import signal

from selfnpo.checkpoint import write_text
from selfnpo.cli import run
from selfnpo.config import TrainConfig, parse_config, to_yaml
from selfnpo.models import DEMO, load_pretrained
from selfnpo.output import prepare_output
from selfnpo.results import RESULTS, demo_report, save_metrics, save_negative
from selfnpo.trainer import Trainer


def main(config: TrainConfig) -> int | None:
    base = load_pretrained(config.pretrained_model_name_or_path)
    trainer = Trainer(config, base, config.output_dir)
    prepare_output(config.output_dir, RESULTS, config.overwrite, resume=config.resume_from_checkpoint is not None)
    write_text(config.output_dir / "config.yaml", to_yaml(config))

    status = trainer.run()
    save_metrics(trainer.state, status)
    if status == "interrupted":
        print(f"interrupted after step {trainer.state.step}; continue with --resume_from_checkpoint latest")
        return 128 + signal.SIGINT
    negative = save_negative(trainer.state)
    print(f"negative model: {negative}")
    if config.pretrained_model_name_or_path == DEMO:
        print(demo_report(trainer.state, status))
    print(f"all results: {config.output_dir}")


if __name__ == "__main__":
    run(lambda: main(parse_config()))
