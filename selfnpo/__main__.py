"""selfnpo COMMAND, or python -m selfnpo COMMAND: all commands under one name."""

import difflib
import sys
from importlib import import_module

from selfnpo import __version__
from selfnpo.cli import nearest, run
from selfnpo.errors import UserError

COMMANDS = {
    "train": "train a negative model from a diffusion model's own truncated rollouts",
    "sample": "compare plain guidance with guidance away from a negative, from the same noise",
    "merge": "combine base and negative into one model",
    "evaluate": "measure the effect of negatives on the embedded demo",
    "env": "print versions and kernels, for bug reports",
}


def dispatch() -> int | None:
    """Run the command named by the first argument.

    Raises:
        UserError: no such command exists.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: selfnpo COMMAND [FLAGS]\n")
        print("\n".join(f"  {command:9} {text}" for command, text in COMMANDS.items()))
        print("\nselfnpo COMMAND --help explains a command; python -m selfnpo.COMMAND is the same.")
        return None
    if name == "--version":
        print(f"selfnpo {__version__}")
        return None
    if name not in COMMANDS:
        similar = difflib.get_close_matches(name, (*COMMANDS, "--help", "--version"), n=1)
        raise UserError(nearest(f"unknown command '{name}'", similar, f"expected one of {', '.join(COMMANDS)}"))
    sys.argv = [f"selfnpo {name}", *sys.argv[2:]]
    return import_module(f"selfnpo.{name}").command()


def main() -> None:
    run(dispatch)


if __name__ == "__main__":
    main()
