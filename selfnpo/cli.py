"""Command lines: parse arguments into dataclasses, and report mistakes in one sentence with exit code 2."""

import contextlib
import difflib
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_type_hints

import tyro

from selfnpo.errors import UserError

Config = TypeVar("Config")


def parse(config_type: type[Config], args: Sequence[str] | None = None, default: Config | None = None) -> Config:
    """Parse command-line arguments into a dataclass; flags have the names of its fields.

    Raises:
        UserError: an unknown flag, an invalid value, or a SELFNPO_BACKEND that cannot run here.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config, unknown = tyro.cli(
                config_type, args=args, default=default, use_underscores=True, prog=_program(), return_unknown_args=True
            )
    except SystemExit as ended:
        if ended.code == 0:  # --help
            raise
        raise UserError(_sentence(said.getvalue())) from None
    if unknown:
        raise UserError(_unknown(unknown[0], config_type))
    if "SELFNPO_BACKEND" in os.environ:
        _check_backend()
    return config


def _program() -> str | None:
    """What the user typed: "selfnpo train" or "python -m selfnpo.train"."""
    if sys.argv[0].startswith("selfnpo "):
        return sys.argv[0]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec and spec.name.startswith("selfnpo") else None


def _sentence(box: str) -> str:
    """The first paragraph of tyro's boxed message, without the frame."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    end = next((number for number, line in enumerate(lines) if line.startswith("───")), len(lines))
    return " ".join(" ".join(lines[:end]).split()).removesuffix(".") + "; --help explains every flag"


def flags(config_type: type) -> list[str]:
    """Every flag of a command, with its aliases."""
    found = []
    for name, hint in get_type_hints(config_type, include_extras=True).items():
        aliases = [alias for each in getattr(hint, "__metadata__", ()) for alias in getattr(each, "aliases", None) or ()]
        found += [f"--{name}", *aliases]
    return found


def _unknown(word: str, config_type: type) -> str:
    if not word.startswith("-"):
        return f"unexpected argument '{word}'; expected flags and their values (--help lists them)"
    name = word.split("=")[0]
    similar = difflib.get_close_matches("--" + name.lstrip("-").replace("-", "_"), flags(config_type), n=1)
    return nearest(f"unknown flag {name}", similar, "--help lists all flags")


def nearest(problem: str, similar: Sequence[str], otherwise: str) -> str:
    """One sentence about an unknown name: the nearest known one, or else `otherwise`."""
    return f"{problem}; " + (f"did you mean {similar[0]}?" if similar else otherwise)


def _check_backend() -> None:
    import torch  # imported here so that mistakes are reported before PyTorch loads

    from selfnpo_kernels.dispatch import backend_for

    try:
        backend_for("this command", torch.empty(0))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{error}; unset SELFNPO_BACKEND or choose another backend") from error


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Settings as command-line arguments that `parse` reads back."""
    found = []
    for name, value in values.items():
        if isinstance(value, bool):
            found.append(f"--{name}" if value else f"--no_{name}")
        else:
            found += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return found


def run(main: Callable[[], int | None]) -> None:
    """Run a command and exit with its code: 2 for a user error, 130 when interrupted, without a traceback for either."""
    _only_our_own_lines()
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted; nothing more was written", file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.exit(code)


def _only_our_own_lines() -> None:
    """Flush output line by line, print warnings as plain sentences, and silence messages from libraries.

    To see the libraries' messages, set their own variables, such as DIFFUSERS_VERBOSITY=info.
    """
    sys.stdout.reconfigure(line_buffering=True)  # also when output goes to a file
    for name, value in (
        ("DIFFUSERS_VERBOSITY", "error"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # about an unused package
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    for category in (DeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)
