"""The project's commands, called in this process."""

import pytest

from selfnpo import evaluate, merge, sample, train
from selfnpo.cli import parse, run
from selfnpo.config import parse_config
from selfnpo.demo import base
from selfnpo.models import DEMO_FOLDER

# Of `train`: a run of seconds.
QUICK = ["--max_train_steps", "4", "--train_batch_size", "8", "--pretrained_model_name_or_path", str(DEMO_FOLDER)]
MAINS = {
    "train": lambda args: train.main(parse_config(args)),
    "sample": lambda args: sample.main(parse(sample.SampleConfig, args)),
    "merge": lambda args: merge.main(parse(merge.MergeConfig, args)),
    "evaluate": lambda args: evaluate.main(parse(evaluate.EvaluateConfig, args)),
    "base": lambda args: base.main(parse(base.BaseConfig, args)),
}


def call(command: str, *args: object) -> int:
    """Exit code of `python -m selfnpo.<command> <args>`."""
    with pytest.raises(SystemExit) as ended:
        run(lambda: MAINS[command]([str(arg) for arg in args]))
    return ended.value.code
