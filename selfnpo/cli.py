"""Command lines: parse arguments into dataclasses, and report mistakes in one sentence with exit code 2."""

import contextlib
import difflib
import errno
import io
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from selfnpo.errors import UserError

Config = TypeVar("Config")
FULL_OR_UNNAMEABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG, errno.EROFS)
BACKENDS = ("reference", "cpp", "triton")  # of selfnpo_kernels.dispatch, which imports PyTorch


def parse(config_type: type[Config], args: Sequence[str] | None = None, default: Config | None = None) -> Config:
    """Parse command-line arguments into a dataclass; flags have the names of its fields.

    Raises:
        UserError: an unknown flag, an invalid value, or a SELFNPO_BACKEND that cannot run here.
    """
    _check_text(config_type, sys.argv[1:] if args is None else args)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config, unknown = tyro.cli(
                config_type, args=args, default=default, use_underscores=True, prog=_program(), return_unknown_args=True
            )
    except SystemExit as ended:
        if ended.code == 0:  # --help
            raise
        raise UserError(_sentence(said.getvalue(), config_type, sys.argv[1:] if args is None else args)) from None
    if unknown:
        raise UserError(_unknown(unknown[0], config_type))
    if "SELFNPO_BACKEND" in os.environ:
        _check_backend()
    return config


def _check_text(config_type: type, args: Sequence[str]) -> None:
    """Raise a UserError for text that is not UTF-8, and for empty names and paths."""
    for word in args:
        try:
            word.encode()
        except UnicodeEncodeError:
            why = f"the argument {word!a} is not UTF-8; expected UTF-8 (PYTHONUTF8=1 reads it in any locale)"
            raise UserError(why) from None
    hints = get_type_hints(config_type)
    for name, names in _names(config_type).items():
        hint = hints[name]
        if {str, Path} & {hint, *get_args(hint)} and get_origin(hint) is not tuple and "" in _values_of(names, args):
            raise UserError(f"{name} is empty; expected a name or a path, or leave it out")


def _program() -> str | None:
    """What the user typed: "selfnpo train" or "python -m selfnpo.train"."""
    if sys.argv[0].startswith("selfnpo "):
        return sys.argv[0]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec and spec.name.startswith("selfnpo") else None


def _sentence(box: str, config_type: type, args: Sequence[str]) -> str:
    """What tyro says in a box, as one of our own sentences; its first paragraph where it says something else."""
    text = " ".join(" ".join(line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))).split())
    if found := re.search(r"Unrecognized options: (\S+)", text):
        return _unknown(found[1], config_type)
    if found := re.search(r"Missing from .*?: (--\S+) (\S+)", text):
        return f"{found[1]} is missing; pass {found[1]} {found[2]}"
    if not (found := re.search(r"(?:Error parsing |argument ')(\(.*?\)|--\S+)", text)):
        return text.split(" ───")[0].removesuffix(".") + "; --help explains every flag"
    names, hints = re.findall(r"--(\w+)", found[1]), get_type_hints(config_type)
    name = next(each for each in names if each in hints)
    got, expected = " ".join(_values_of(names, args)), _expected(hints[name])
    return f"{name} is {got!r}; expected {expected}" if got else f"{name} has no value; expected {expected}"


def _values_of(names: Sequence[str], args: Sequence[str]) -> list[str]:
    """What follows the last of some flags on a command line."""
    values: list[str] = []
    asked = False
    for word in args:
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            asked = flag.removeprefix("--").replace("-", "_") in names
            if asked:
                values = [value] if equals else []
        elif asked:
            values.append(word)
    return values


def _expected(hint: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), [each for each in get_args(hint) if each is not type(None)]
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if origin is tuple:
        return f"{'one or more values' if inner[-1] is ... else f'{len(inner)} values'}, each {_expected(inner[0])}"
    if inner:  # X | None
        return _expected(inner[0])
    return {int: "a whole number", float: "a number", Path: "a path"}.get(hint, "a value")


def _names(config_type: type) -> dict[str, list[str]]:
    """Every field of a command, with all names of its flag, without dashes."""
    found = {}
    for name, hint in get_type_hints(config_type, include_extras=True).items():
        aliases = [alias for each in getattr(hint, "__metadata__", ()) for alias in getattr(each, "aliases", None) or ()]
        found[name] = [name, *(alias.removeprefix("--") for alias in aliases)]
        found[name] += [f"no_{name}"] if hint is bool or bool in get_args(hint)[:1] else []
    return found


def _unknown(word: str, config_type: type) -> str:
    if not word.startswith("-"):
        return f"unexpected argument '{word}'; expected flags and their values (--help lists them)"
    name, flags = word.split("=")[0], [flag for names in _names(config_type).values() for flag in names]
    typed = name.lstrip("-").replace("-", "_")
    similar = [flag for flag in flags if flag.startswith(typed)] or difflib.get_close_matches(typed, flags, n=1)
    return nearest(f"unknown flag {name}", [f"--{each}" for each in similar], "--help lists all flags")


def nearest(problem: str, similar: Sequence[str], otherwise: str) -> str:
    """One sentence about an unknown name: the nearest known one, or else `otherwise`."""
    return f"{problem}; " + (f"did you mean {similar[0]}?" if similar else otherwise)


def _check_backend() -> None:
    name = os.environ["SELFNPO_BACKEND"]
    if name and name not in BACKENDS:
        expected = f"expected one of {', '.join(BACKENDS)}, or unset SELFNPO_BACKEND"
        raise UserError(nearest(f"SELFNPO_BACKEND is '{name}'", difflib.get_close_matches(name, BACKENDS, n=1), expected))
    import torch  # only here, so that mistakes are answered before PyTorch is loaded

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
    except BrokenPipeError:  # the reader, such as head, has seen enough
        code = 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in FULL_OR_UNNAMEABLE:
            raise
        print(f"error: {error.filename or 'the output'} cannot be opened or written: {error.strerror}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted; nothing more was written", file=sys.stderr)
        code = 128 + signal.SIGINT
    try:
        sys.stdout.flush()
    except OSError:  # Python tries once more when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _only_our_own_lines() -> None:
    """Flush output line by line, print warnings as plain sentences, and silence messages from libraries.

    To see the libraries' messages, set their own variables, such as DIFFUSERS_VERBOSITY=info.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    sys.stdout.reconfigure(line_buffering=True)  # also when output goes to a file
    for name, value in (
        ("DIFFUSERS_VERBOSITY", "error"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_VERBOSITY", "error"),  # what fails there is said in our own sentences
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it may be imported already, and retries aloud
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # misses a package that is not used here

    def show(message: Warning, *_: object, **__: object) -> None:
        print(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = show
    for category in (DeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)
