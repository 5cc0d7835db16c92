"""Train a negative for the embedded demo from Python, without the command line, and save it as a diffusers model.

python examples/train_from_python.py
"""

import argparse

from selfnpo.config import TrainConfig
from selfnpo.models import load_pretrained
from selfnpo.training.trainer import Trainer

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--max_train_steps", type=int, default=200)
parser.add_argument("--output_dir", default="negative")
args = parser.parse_args()

config = TrainConfig(max_train_steps=args.max_train_steps, train_batch_size=32)
trainer = Trainer(config, load_pretrained())  # with output_dir=Path(...) it also writes checkpoints and a log
for step in range(1, config.max_train_steps + 1):  # or trainer.run(), which also logs, saves and handles Ctrl-C
    loss, grad_norm = trainer.train_step()
    if step % 50 == 0 or step == config.max_train_steps:
        print(f"step {step}: loss {loss.item():.4f}, gradient norm {grad_norm.item():.3f}")
trainer.state.model.save_pretrained(args.output_dir)
print(f"negative model: {args.output_dir}")
