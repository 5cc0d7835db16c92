"""Progress of slow work: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from tqdm import tqdm

# Without a terminal: seconds before the first line of progress, and between two lines.
FIRST_LINE, LINE_SECONDS = 1.5, 10.0


class Lines:
    """Progress without a terminal, with the methods of `tqdm` that are used here. It prints a line after FIRST_LINE seconds
    and then every LINE_SECONDS, even during one long iteration. Work that ends sooner prints nothing in between.

    Without an iterable and a total it only reports that something is still running.
    """

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        *,
        desc: str,
        total: int | None = None,
        initial: int = 0,
        unit: str = "",
        leave: bool = True,
    ):
        self.iterable, self.desc, self.unit, self.leave = iterable, desc, unit, leave
        self.total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self.n = self.initial = initial
        self.postfix, self.started = "", time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._tell, daemon=True).start()

    def _tell(self) -> None:
        wait = FIRST_LINE
        while not self._closed.wait(wait):
            self._print()
            wait = LINE_SECONDS

    def _print(self) -> None:
        tqdm.write(str(self), file=sys.stderr)  # above the bars of a terminal

    def __str__(self) -> str:
        seconds, units = time.monotonic() - self.started, f"{self.unit}{'es' if self.unit.endswith('ch') else 's'}"
        rate = (self.n - self.initial) / max(seconds, 1e-9)
        parts = []
        if self.total is not None:
            parts.append(f"{self.n:,} of {self.total:,} {units}")
        parts.append(f"{tqdm.format_interval(seconds)} passed")
        if rate:
            if self.n < self.total:
                parts.append(f"{tqdm.format_interval((self.total - self.n) / rate)} left")
            parts.append(f"{rate:.3g} {units}/s" if rate > 1 else f"{1 / rate:.3g} s per {self.unit}")
        return f"{self.desc}: {', '.join(filter(None, (*parts, self.postfix)))}"

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def update(self, n: int = 1) -> None:
        self.n += n

    def set_postfix_str(self, text: str) -> None:
        self.postfix = text

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        if self.leave:
            self._print()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> "tqdm | Lines":
    """A progress bar, or `Lines` if stderr is not a terminal. Takes the arguments of `Lines`."""
    return tqdm(iterable, **options) if sys.stderr.isatty() else Lines(iterable, **options)


def lasting(what: str) -> Lines:
    """A context for slow work that cannot be counted, such as reading weights. It says so every few seconds."""
    return Lines(desc=what, leave=False)
