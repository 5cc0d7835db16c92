"""The project's commands, called in this process."""

import pytest

from selfnpo import evaluate, merge, sample, train
from selfnpo.cli import run
from selfnpo.demo import base
from selfnpo.models import DEMO_FOLDER

# Of `train`: a run of seconds.
QUICK = ["--max_train_steps", "4", "--train_batch_size", "8", "--pretrained_model_name_or_path", str(DEMO_FOLDER)]
COMMANDS = {"train": train, "sample": sample, "merge": merge, "evaluate": evaluate, "base": base}


def call(command: str, *args: object) -> int:
    """Exit code of `python -m selfnpo.<command> <args>`."""
    with pytest.raises(SystemExit) as ended:
        run(lambda: COMMANDS[command].command([str(arg) for arg in args]))
    return ended.value.code
