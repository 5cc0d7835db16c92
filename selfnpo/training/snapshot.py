"""Checkpoints that are written while training continues.

    if the tensors           they are written              and training waits for
    change with every step   from a copy in host memory    the copy
    do not change any more   directly, one by one          nothing
    do not fit twice         directly, one by one          the whole write

The copy is queued behind the last step. On a GPU it goes into pinned memory, which is reused by the next checkpoint.
"""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from selfnpo.errors import UserError
from selfnpo.training.checkpoint import prune_checkpoints, remove_partial, save_checkpoint
from selfnpo.training.state import TrainState

MARGIN = 1 << 30  # bytes of host memory that a snapshot leaves free
_CONTAINERS = (  # limit, usage, and the part of usage that is only cache, for both versions of control groups
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class CheckpointWriter:
    """Writes checkpoints of a run, one at a time."""

    def __init__(self, state: TrainState, output_dir: Path):
        device = state.base.device
        self.state, self.output_dir, self.on_gpu = state, output_dir, device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.on_gpu else None
        self._buffers: dict[str, Tensor] = {}
        self._copied: list[torch.cuda.Event] = []  # before and after a copy that the device makes between two steps
        self.done = threading.Event()  # instead of the thread's `join`, which may return too early after Ctrl-C
        self.done.set()
        self._error: BaseException | None = None
        self._cancelled = threading.Event()
        self.fits_twice = True  # in host memory, as far as we know

    def __enter__(self) -> "CheckpointWriter":
        self._cancelled.clear()
        self._error = None
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Finish a checkpoint in progress however training ended. Only a second Ctrl-C gives it up."""
        if kind is KeyboardInterrupt:
            self.cancel()
        elif kind:
            try:
                self.wait()
            except UserError as error:
                tqdm.write(f"the last checkpoint is lost: {error}")

    def save(self, final: bool = False) -> None:
        """Start writing a checkpoint of the last step, after the previous one is complete.

        Args:
            final: the tensors will not change until it is written.

        Raises:
            UserError: this checkpoint or the previous one could not be written.
        """
        self.wait()
        state = self.state
        with state.held_up_by("checkpoints"):
            live, scalars = state.tensors(), state.scalars()
            tensors = live if final else self._snapshot(live)
            if self._stream:
                self._stream.wait_stream(torch.cuda.current_stream(state.base.device))
            write = partial(self._write, self.output_dir / f"checkpoint-{state.step}", tensors or live, scalars)
            if tensors is None:
                write()
            else:
                self.done.clear()
                threading.Thread(target=self._in_thread, args=(write,), name="checkpoint").start()

    def wait(self) -> None:
        """Wait until the checkpoint is on disk, and raise any error of writing it. Ctrl-C gives it up."""
        with self.state.held_up_by("checkpoints"):
            try:
                self.done.wait()
            except KeyboardInterrupt:
                self.cancel()
                raise
        if self._copied:
            before, after = self._copied
            self.state.beside["checkpoints"] += before.elapsed_time(after) / 1e3
            self._copied = []
        self.check()

    def check(self) -> None:
        """Raise the last error of the writer, once."""
        if self._error:
            error, self._error = self._error, None
            raise error

    def cancel(self) -> None:
        """Give up the checkpoint in progress. Earlier checkpoints stay."""
        self._cancelled.set()
        self.done.wait()

    def _in_thread(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self._error = error  # raised by the next `check` of the training thread
        finally:
            self.done.set()

    def _write(self, folder: Path, tensors: dict[str, Tensor], scalars: dict) -> None:
        with self._aside(), ThreadPoolExecutor(1) as other:
            if self._stream:
                self._stream.synchronize()
            remove_partial(self.output_dir)
            base = other.submit(self._fingerprint)  # takes seconds, but only once
            save_checkpoint(folder, tensors, lambda: scalars | {"base_sha256": base.result()}, self._go_on)
        prune_checkpoints(self.output_dir, self.state.config.checkpoints_total_limit)

    def _fingerprint(self) -> str:
        with self._aside():
            return self.state.fingerprint

    def _aside(self) -> AbstractContextManager:
        """On a GPU, a stream of its own: on the training stream a copy would wait for all queued steps."""
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def _go_on(self) -> None:
        if self._cancelled.is_set():
            raise KeyboardInterrupt

    def _snapshot(self, live: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """A copy in host memory of the tensors after the last step; None if it does not fit."""
        buffers = self._buffers
        if buffers.keys() != live.keys():
            self._buffers = buffers = {}
            # PyTorch's allocator of pinned memory rounds every block up to a power of two.
            size = sum(1 << (each.nbytes - 1).bit_length() if self.on_gpu else each.nbytes for each in live.values())
            try:
                if size + MARGIN > free_host_memory():
                    raise MemoryError
                buffers = {
                    name: torch.empty_like(tensor, device="cpu", pin_memory=self.on_gpu) for name, tensor in live.items()
                }
            except (RuntimeError, MemoryError):
                if self.fits_twice:
                    self.fits_twice = False
                    tqdm.write(
                        "note: training pauses while a checkpoint is written, because a copy of its "
                        f"{size / 1e9:.1f} GB does not fit in host memory"
                    )
                return None
            self._buffers = buffers if self.on_gpu else {}  # pinning takes seconds, so only pinned memory is kept
        if self.on_gpu:
            self._copied = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._copied[0].record()
        for name, tensor in live.items():
            buffers[name].copy_(tensor, non_blocking=True)
        if self.on_gpu:
            self._copied[1].record()
        return buffers


def free_host_memory() -> int:
    """Bytes of host memory that are free, minus what this process has used at its peak and may need again for a step. An
    unknown limit counts as unlimited."""
    process = _table(Path("/proc/self/status"))
    free = _table(Path("/proc/meminfo")).get("MemAvailable", sys.maxsize)
    for folder, limit, usage, idle in _CONTAINERS:
        used = _number(folder / usage) - _table(folder / "memory.stat").get(idle, 0)
        free = min(free, _number(folder / limit, sys.maxsize) - used)
    return free - (process.get("VmHWM", 0) - process.get("VmRSS", 0))


def _table(path: Path) -> dict[str, int]:
    """Parses lines of "name number", with an optional unit of kB."""
    try:
        rows = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) << (10 if row[2:] == ["kB"] else 0) for row in rows if len(row) > 1 and row[1].isdigit()}


def _number(path: Path, unknown: int = 0) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return unknown
