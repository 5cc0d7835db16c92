"""Reference and student in one step. The student's sample x_s depends only on x_t, so both networks may run at once.

    strategy     what runs                                                        works for
    sequential   the reference, then the student                                  everything
    streams      both as parallel branches of one CUDA graph                      a GPU
    shared       one forward pass, in which layers of the base take both batches  a LoRA, not compiled

An ordinary joint batch would be slower, because autograd would differentiate the reference's half too. `shared`
differentiates only the student's half.
"""

import json
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from selfnpo.device import seconds_of
from selfnpo.errors import first_line
from selfnpo.files import write_text
from selfnpo.models import PretrainedModel
from selfnpo.models.lora.adapters import REFERENCE, STUDENT
from selfnpo.training.capture import capture, on_stream
from selfnpo.training.joint import joint, pair
from selfnpo.training.objective import StudentBatch
from selfnpo.training.rollout import Reference, RolloutBatch
from selfnpo.training.student import Student

GAIN = 0.03  # share of time by which another strategy must beat `sequential`
ROUNDS = 7

Outputs = tuple[Tensor, Tensor | None]  # (cond, uncond) of the reference


class Tandem:
    """Runs reference and student by one strategy."""

    def __init__(self, student: Student, reference: Reference | None, base: PretrainedModel, strategy: str):
        """`reference` is None if rollouts come with targets."""
        self.student, self.reference, self.base, self.strategy = student, reference, base, strategy
        self.side = torch.cuda.Stream() if strategy == "streams" else None

    @contextmanager
    def __call__(self, batch: RolloutBatch, asked: StudentBatch) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """Yields (target, prev_sample, model_output) `[B, ...]`: the reference's estimate of x_0 at x_t, its next state
        (None if the rollout came with the target), and the student's output at x_s. Run the backward pass inside."""
        student = self.student
        if self.strategy == "shared":
            with joint(student.layers.values(), STUDENT, REFERENCE if student.averaged else None):
                yield self._moved_on(batch, *self._together(batch, asked))
            return
        outputs = self._evaluate(batch) if batch.target is None else None
        with student.training():
            model_output = self.base.predict(student.model, asked.sample, asked.timesteps, asked.condition)
            if self.side is not None:
                torch.cuda.current_stream().wait_stream(self.side)
            yield self._moved_on(batch, outputs, model_output)

    @torch.no_grad()
    def _evaluate(self, batch: RolloutBatch) -> Outputs:
        """Runs on the side stream if there is one. Callers must wait for it before they use the outputs."""
        asked = self.student.reference, batch.sample, batch.position, batch.condition
        if self.side is None:
            return self.reference.evaluate(*asked)
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            return self.reference.evaluate(*asked)

    def _together(self, batch: RolloutBatch, asked: StudentBatch) -> tuple[Outputs, Tensor]:
        base, condition = self.base, batch.condition
        if self.reference.guidance_scale == 0:
            condition = torch.full_like(condition, base.null_condition)
        one = base.arguments(batch.sample, self.reference.timesteps[base.move(batch.position)], condition)
        other = base.arguments(asked.sample, asked.timesteps, asked.condition)
        with base.arithmetic(self.student.model):
            both = base.family.call(self.student.weights, *pair(one, other))
        return (both.reference, None), both.student

    def _moved_on(
        self, batch: RolloutBatch, outputs: Outputs | None, model_output: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        if outputs is None:
            return batch.target, None, model_output
        prev_sample, target = self.reference.move_on(batch.sample, batch.position, outputs)
        return target, prev_sample, model_output


def fastest(
    probes: dict[str, Callable[[], tuple[Tensor, ...]]],
    machine_and_run: Callable[[], str],
    device: torch.device,
    say: Callable[[str], object] = print,
) -> str:
    """The fastest of several strategies; calling a probe runs its strategy once. Cached under the key `machine_and_run`."""
    if len(probes) == 1:
        return next(iter(probes))
    key, known = machine_and_run(), _read_cache()
    if known.get(key, {}).get("strategy") not in probes:
        milliseconds, failed = _measure(probes, device)
        for name, reason in failed.items():
            say(f"reference and student: {name} cannot run here: {reason}")
        if "sequential" not in milliseconds or len(milliseconds) == 1:
            return "sequential"  # not cached: another day there may be more memory
        best = min(milliseconds, key=milliseconds.get)
        if milliseconds[best] > (1 - GAIN) * milliseconds["sequential"]:
            best = "sequential"
        known[key] = {"strategy": best, "milliseconds": milliseconds}
        _write_cache(known)
    chosen = known[key]
    times = ", ".join(f"{name} {value:.3g} ms" for name, value in chosen["milliseconds"].items())
    say(f"reference and student: {chosen['strategy']} ({times})")
    return chosen["strategy"]


def _measure(
    probes: dict[str, Callable[[], tuple[Tensor, ...]]], device: torch.device
) -> tuple[dict[str, float], dict[str, str]]:
    """Median milliseconds, measured in turns (on a GPU, of replayed graphs), and why the missing ones could not run."""
    failed = {}
    if device.type == "cuda":
        stream, pool, captured = torch.cuda.Stream(), torch.cuda.graph_pool_handle(), {}
        for name, probe in probes.items():
            try:
                on_stream(stream, probe)
                captured[name] = capture(probe, pool, stream)
            except RuntimeError as error:  # out of memory is one too
                failed[name] = first_line(error)
        probes = captured
    seconds: dict[str, list[float]] = {name: [] for name in probes}
    for turn in range(ROUNDS + 1):
        for name, probe in probes.items():
            taken = seconds_of(probe, device)
            if turn:
                seconds[name].append(taken)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}, failed


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "selfnpo" / "tandem.json"


def _read_cache() -> dict:
    try:
        return json.loads(_cache_file().read_text())
    except (OSError, ValueError):
        return {}


def _write_cache(known: dict) -> None:
    try:
        _cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_text(_cache_file(), json.dumps(known, indent=1))
    except OSError:
        pass  # measured again next time
