"""The project's commands, called in this process."""

import pytest

from selfnpo import evaluate, merge, sample, train
from selfnpo.cli import parse, run
from selfnpo.config import parse_config
from selfnpo.world import base

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
