"""What diffusers and transformers print while they load."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


@contextmanager
def silent() -> Iterator[None]:
    """A context without their bars, which say what our own lines say, and without proposals to install other packages."""
    libraries = diffusers_logging, transformers_logging
    before = [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in libraries]
    try:
        for each in libraries:
            each.set_verbosity_error()
            each.disable_progress_bar()
        yield
    finally:
        for each, (verbosity, has_bars) in zip(libraries, before, strict=True):
            each.set_verbosity(verbosity)
            if has_bars:
                each.enable_progress_bar()
