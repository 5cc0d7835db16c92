"""Compare two negatives on the embedded demo: same noise, same labels, paired differences with 95 % intervals.

python examples/evaluate_two_arms.py
"""

import argparse

from selfnpo.config import TrainConfig
from selfnpo.demo.evaluation import CFG, evaluate
from selfnpo.demo.metrics import Metrics
from selfnpo.inputs.digits import halves
from selfnpo.models import load_pretrained
from selfnpo.training.trainer import Trainer

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--max_train_steps", type=int, default=400)
parser.add_argument("--num_samples", type=int, default=1000)
parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
parser.add_argument("--guidance_scale", type=float, default=3.0)
args = parser.parse_args()

base = load_pretrained()


def negative(seed: int, **settings):
    trainer = Trainer(TrainConfig(seed=seed, max_train_steps=args.max_train_steps, **settings), base)
    trainer.run()
    return trainer.state.model


# For each seed, the negative models to compare. Plain guidance (CFG) is measured beside them.
negatives = ({"l2": negative(seed), "huber": negative(seed, loss="huber", huber_c=0.1)} for seed in args.seeds)
_, held_out = halves("final")
found = evaluate(base, Metrics(held_out), negatives, tuple(args.seeds), (args.guidance_scale,), args.num_samples)
for metric in ("fd", "precision", "recall"):
    print(metric)
    for arm in ("l2", "huber"):
        value, gain = (of(arm, args.guidance_scale, metric) for of in (found.estimate, found.difference))
        print(f"  {arm:5} {value}, minus {CFG}: {gain:+}")
