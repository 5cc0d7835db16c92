"""Command lines: typed arguments in, one sentence and exit code 2 out when something is wrong."""

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import tyro

from selfnpo.errors import UserError
from selfnpo_kernels.dispatch import backend_for

Config = TypeVar("Config")


def parse(config_type: type[Config], args: Sequence[str] | None = None, default: Config | None = None) -> Config:
    """Command-line arguments as a dataclass, flags written as the fields are; exits with code 2 and a hint on bad ones.

    Raises:
        UserError: SELFNPO_BACKEND forces a backend that cannot run here.
    """
    config = tyro.cli(config_type, args=args, default=default, use_underscores=True)
    try:
        backend_for("this command", torch.empty(0))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{error}; unset SELFNPO_BACKEND or set it to another one") from error
    return config


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Settings as words of a command line, which `parse` reads back."""
    flags = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return flags


def run(main: Callable[[], int | None]) -> None:
    """Run a command and exit with its code: 2 for a user's mistake, 130 when interrupted, never a traceback for either."""
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted; nothing further was written", file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.exit(code)
