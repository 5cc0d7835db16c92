"""The training loop: steps, log, checkpoints, stopping."""

import json
import math
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from selfnpo.cli import as_flags
from selfnpo.config import TrainConfig, to_yaml
from selfnpo.device import Meter
from selfnpo.errors import UserError, first_line, is_out_of_memory
from selfnpo.files import write_text
from selfnpo.inputs.data import TrainData
from selfnpo.models import PretrainedModel
from selfnpo.output import list_checkpoints
from selfnpo.progress import lasting, progress
from selfnpo.schedule import make_grid
from selfnpo.training.checkpoint import load_checkpoint, load_latest
from selfnpo.training.log import RunLog
from selfnpo.training.rollout import Rollout, make_rollout
from selfnpo.training.snapshot import CheckpointWriter
from selfnpo.training.state import TrainState
from selfnpo.training.step import TrainingStep
from selfnpo.training.validation import save_grid

DELTA_STEPS = 100  # steps between measurements of how far full weights have moved; each copies the base from host to GPU
REST = 50  # a timed checkpoint waits until training has run this many times as long as the last one held it up


class Trainer:
    """One training run. Without an `output_dir` it writes nothing and cannot be resumed."""

    def __init__(
        self,
        config: TrainConfig,
        base: PretrainedModel,
        output_dir: Path | None = None,
        rollout: Rollout | None = None,
        data: TrainData | None = None,
    ):
        self.config, self.base, self.output_dir = config, base, output_dir
        if base.device.type == "cuda":
            torch.cuda.set_device(base.device)  # streams and graphs are created on the current GPU
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
        grid = make_grid(base.scheduler, config.num_inference_steps)
        self.state = TrainState.start(config, base, rollout or make_rollout(config, base, grid, data))
        self.step = TrainingStep(self.state, grid)
        self.meter = Meter(base.device)
        if config.resume_from_checkpoint is not None:
            latest = config.resume_from_checkpoint == "latest"
            self.state.restore(
                *(load_latest(output_dir) if latest else load_checkpoint(Path(config.resume_from_checkpoint)))
            )
            self._truncate_log()
        self.writer = CheckpointWriter(self.state, output_dir) if output_dir else None
        self.log: RunLog | None = None  # while the run writes
        self._saved_at, self._held_up = self.state.seconds, 0.0  # when the last checkpoint was taken, its delay

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One complete step. Returns (loss, gradient norm) without waiting for the device."""
        state = self.state
        loss, grad_norm = self.step()
        state.lr_scheduler.step()
        state.optimizer.set_rate()
        state.reference_evaluations += self.step.evaluations
        state.step += 1
        return loss, grad_norm

    def run(self, wait: bool = True) -> str:
        """Train to the end. Returns why training ended: completed, strength reached or interrupted.

        Args:
            wait: whether to wait for the last checkpoint. If False, and the run is not interrupted, `closing` waits for it,
                and nothing may change the state until then.
        """
        config, state = self.config, self.state
        losses: list[Tensor] = []
        if self.output_dir:
            write_text(self.output_dir / "config.yaml", to_yaml(config))
            self.log = RunLog(config, self.output_dir)
        with lasting("preparing the steps"):
            self.step.prepare()
        started, ending = time.perf_counter() - state.seconds, "completed"
        with (
            _interruptible() as interrupted,
            self.writer or nullcontext(),
            progress(total=config.max_train_steps, initial=state.step, desc="train", unit="step") as bar,
        ):
            while state.step < config.max_train_steps and ending == "completed":
                loss, grad_norm = self.train_step()
                losses.append(loss)
                bar.update()
                if self.writer:
                    self.writer.check()
                last = state.step == config.max_train_steps
                if last or state.step % config.logging_steps == 0:
                    row = self._log_row(losses, grad_norm, started)
                    losses.clear()
                    with state.held_up_by("logging"):
                        if self.log:
                            self.log.write(row)
                        moved = f", moved={state.moved[1]:.2%}" if state.moved else ""
                        bar.set_postfix_str(f"loss={row['loss']:.4f}{moved}")
                    if config.max_relative_delta is not None and row["relative_delta"] >= config.max_relative_delta:
                        ending = "strength reached"
                if interrupted():
                    ending = "interrupted"
                final, seconds = last or ending != "completed", time.perf_counter() - started
                if final or self._is_due(seconds):
                    state.seconds = self._saved_at = seconds
                    self._checkpoint(final)
                if config.validation_steps and state.step % config.validation_steps == 0:
                    pause = time.perf_counter()
                    self.save_grid()
                    started += time.perf_counter() - pause
            if wait or ending == "interrupted":
                self.close()
        return ending

    def close(self) -> None:
        """Wait for the last checkpoint, and end the log."""
        if self.log:
            self.log.close()
            self.log = None
        if self.writer:
            self.writer.wait()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """A context for work after `run(wait=False)`. On leaving it, even by SIGTERM, it waits for the last checkpoint."""
        with _handled(signal.default_int_handler):
            try:
                yield
            except KeyboardInterrupt:
                print(f"{self.last_checkpoint()}; write the missing results with\n  {resume_command(self.config)}")
                raise
            finally:
                self.close()

    def _is_due(self, seconds: float) -> bool:
        """Whether it is time for a checkpoint, after `seconds` of training."""
        if self.config.checkpointing_steps:
            return self.state.step % self.config.checkpointing_steps == 0
        return seconds - self._saved_at >= max(60 * self.config.checkpointing_minutes, REST * self._held_up)

    def save_grid(self) -> Path | None:
        """Write plain samples next to samples guided by the student into output_dir/samples. Returns None without an
        output_dir, or when memory runs out: that costs the picture but not the run."""
        if not self.output_dir:
            return None
        eager = torch.compiler.set_stance("force_eager")  # pictures and training use different shapes
        try:
            with self.state.held_up_by("pictures"), eager:
                picture = save_grid(self.output_dir / "samples" / f"step-{self.state.step:06}.png", self.state)
                if self.log:
                    self.log.picture(picture, self.state.step)
                return picture
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            tqdm.write(
                f"warning: no picture of step {self.state.step}, out of memory ({first_line(error)}); pass "
                "--num_validation_images 1, or run python -m selfnpo.sample with --batch_size 1 after training"
            )
            return None

    def _log_row(self, losses: list[Tensor], grad_norm: Tensor, started: float) -> dict[str, Any]:
        state = self.state
        self.meter.sample()
        loss = torch.stack(losses).mean().item()  # waits for the device
        delta = state.relative_delta() if self._looks_at_delta() else None
        with state.held_up_by("logging"):
            state.seconds = time.perf_counter() - started
            row = {
                "step": state.step,
                "loss": loss,
                "grad_norm": grad_norm.item(),
                "learning_rate": state.lr_scheduler.get_last_lr()[0],
                "relative_delta": delta,
                "reference_evaluations": state.reference_evaluations,
                "samples_per_second": state.step * self.config.total_batch_size / state.seconds,
            }
        if state.scaler.is_enabled() and not math.isfinite(row["grad_norm"]):
            row["grad_norm"] = None  # the step was skipped and the loss scale lowered
        if not all(row[name] is None or math.isfinite(row[name]) for name in ("loss", "grad_norm", "relative_delta")):
            raise UserError(
                f"training diverged by step {state.step} (loss {row['loss']}, gradient norm {row['grad_norm']}); lower "
                f"learning_rate (now {self.config.learning_rate}); {self.last_checkpoint()}"
            )
        return row

    def _looks_at_delta(self) -> bool:
        """Whether this log row includes how far the weights have moved."""
        config, step = self.config, self.state.step
        if config.rank or config.max_relative_delta is not None or step == config.max_train_steps:
            return True
        return step % DELTA_STEPS < config.logging_steps  # the first row after every DELTA_STEPS steps

    def last_checkpoint(self) -> str:
        """A sentence that names the last checkpoint, for a run that ends here."""
        if not self.writer:
            return "no checkpoint was saved"
        failure = ""
        try:
            self.writer.wait()
        except UserError as error:
            failure = f"; {error}"
        found = list_checkpoints(self.output_dir)
        return (f"the last good checkpoint is {found[-1]}" if found else "no checkpoint was saved") + failure

    def _checkpoint(self, final: bool = False) -> None:
        if self.writer:
            before = self.state.beside["checkpoints"]
            self.writer.save(final)
            self._held_up = self.state.beside["checkpoints"] - before

    def _truncate_log(self) -> None:
        """Drop the lines that the resumed run will write again."""
        path = self.output_dir / "log.jsonl"
        if path.is_file():
            lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= self.state.step]
            write_text(path, "".join(f"{line}\n" for line in lines))


def resume_command(config: TrainConfig) -> str:
    """The command line that goes on with a run from its last checkpoint."""
    flags = {
        "config": config.output_dir / "config.yaml",
        "output_dir": config.output_dir,
        "resume_from_checkpoint": "latest",
    }
    if config.push_to_hub:
        flags |= {"push_to_hub": True} | ({"hub_model_id": config.hub_model_id} if config.hub_model_id else {})
    return shlex.join(("python", "-m", "selfnpo.train", *as_flags(flags)))


@contextmanager
def _interruptible() -> Iterator:
    """Ctrl-C or SIGTERM stops the loop after the current step. A second one stops at once."""
    received: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    with _handled(handler):
        yield lambda: bool(received)


@contextmanager
def _handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM call `handler`."""
    try:
        previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, so signals cannot be handled here
        previous = {}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
