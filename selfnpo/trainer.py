"""The training loop: steps, log, checkpoints, stopping."""

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from selfnpo.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_latest,
    prune_checkpoints,
    save_checkpoint,
    write_text,
)
from selfnpo.config import TrainConfig
from selfnpo.data import TrainData, encode_data
from selfnpo.errors import UserError
from selfnpo.meter import Meter
from selfnpo.models import PretrainedModel
from selfnpo.rollout import DataRollout, NoiseRollout, Reference, Rollout, TrajectoryPool
from selfnpo.schedule import make_grid
from selfnpo.state import TrainState
from selfnpo.step import TrainingStep
from selfnpo.validation import save_grid


def make_rollout(config: TrainConfig, base: PretrainedModel, data: TrainData | None = None) -> Rollout:
    grid = make_grid(base.scheduler, config.num_inference_steps)
    reference = Reference(base, grid, config.rollout_guidance_scale, config.train_batch_size)
    if config.rollout == "pool":
        return TrajectoryPool(reference, config.total_batch_size, config.seed, config.pool_size)
    if config.rollout == "data":
        samples, conditions = encode_data(data, base) if data and data.files else _digits()
        return DataRollout(
            reference, config.total_batch_size, config.seed, grid, samples, conditions, config.num_rollout_steps
        )
    return NoiseRollout(reference, config.total_batch_size, config.seed, full=config.rollout == "full")


def _digits() -> tuple[Tensor, Tensor]:
    from selfnpo.world.data import halves  # scikit-learn is slow to import

    digits, _ = halves()
    return digits.images, digits.labels


class Trainer:
    """One run. Without an `output_dir` nothing is written and nothing can be resumed."""

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
            torch.cuda.set_device(base.device)  # streams and graphs are made on the current GPU
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
        self.state = TrainState.start(config, base, rollout or make_rollout(config, base, data))
        self.step = TrainingStep(self.state)
        self.meter = Meter(base.device)
        if config.resume_from_checkpoint is not None:
            latest = config.resume_from_checkpoint == "latest"
            self.state.restore(
                *(load_latest(output_dir) if latest else load_checkpoint(Path(config.resume_from_checkpoint)))
            )
            self._truncate_log()

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One step of the whole recipe; (loss, gradient norm), not yet synchronised with the host."""
        state = self.state
        loss, grad_norm = self.step()
        state.lr_scheduler.step()
        state.optimizer.set_rate()
        state.reference_evaluations += self.step.evaluations
        state.step += 1
        return loss, grad_norm

    def run(self) -> str:
        """Train to the end. Returns why it ended: completed, strength reached or interrupted."""
        config, state = self.config, self.state
        losses: list[Tensor] = []
        self.step.prepare()
        started, ending = time.perf_counter() - state.seconds, "completed"
        with (
            _interruptible() as interrupted,
            _log_writer(config, self.output_dir) as log,
            tqdm(total=config.max_train_steps, initial=state.step, desc="train", unit="step", disable=None) as progress,
        ):
            while state.step < config.max_train_steps and ending == "completed":
                loss, grad_norm = self.train_step()
                losses.append(loss)
                progress.update()
                last = state.step == config.max_train_steps
                if last or state.step % config.logging_steps == 0:
                    row = self._log_row(losses, grad_norm, started)
                    losses.clear()
                    log(row)
                    progress.set_postfix(loss=f"{row['loss']:.4f}", moved=f"{row['relative_delta']:.2%}")
                    if config.max_relative_delta is not None and row["relative_delta"] >= config.max_relative_delta:
                        ending = "strength reached"
                if interrupted():
                    ending = "interrupted"
                if last or ending != "completed" or state.step % config.checkpointing_steps == 0:
                    state.seconds = time.perf_counter() - started
                    self._checkpoint()
                if config.validation_steps and state.step % config.validation_steps == 0:
                    pause = time.perf_counter()
                    self.save_grid()
                    started += time.perf_counter() - pause
        return ending

    def save_grid(self) -> Path | None:
        """A picture of plain samples beside those guided by the student, in output_dir/samples."""
        if not self.output_dir:
            return None
        with torch.compiler.set_stance("force_eager"):  # pictures have other shapes than training
            return save_grid(self.output_dir / "samples" / f"step-{self.state.step:06}.png", self.state)

    def _log_row(self, losses: list[Tensor], grad_norm: Tensor, started: float) -> dict[str, Any]:
        state = self.state
        self.meter.sample()
        loss = torch.stack(losses).mean().item()  # waits for the device
        state.seconds = time.perf_counter() - started
        row = {
            "step": state.step,
            "loss": loss,
            "grad_norm": grad_norm.item(),
            "learning_rate": state.lr_scheduler.get_last_lr()[0],
            "relative_delta": state.relative_delta(),
            "reference_evaluations": state.reference_evaluations,
            "samples_per_second": state.step * self.config.total_batch_size / state.seconds,
        }
        if state.scaler.is_enabled() and not math.isfinite(row["grad_norm"]):
            row["grad_norm"] = None  # the step was left out, and the scale of the loss lowered
        if not all(row[name] is None or math.isfinite(row[name]) for name in ("loss", "grad_norm", "relative_delta")):
            raise UserError(
                f"training diverged by step {state.step} (loss {row['loss']}, gradient norm {row['grad_norm']}); lower "
                f"learning_rate (now {self.config.learning_rate}); {self.last_checkpoint()}"
            )
        return row

    def last_checkpoint(self) -> str:
        """What is left of a run that ends here, in words."""
        found = list_checkpoints(self.output_dir) if self.output_dir else []
        return f"the last good checkpoint is {found[-1]}" if found else "no checkpoint was taken before"

    def _checkpoint(self) -> None:
        if self.output_dir:
            save_checkpoint(self.output_dir / f"checkpoint-{self.state.step}", self.state.tensors(), self.state.scalars())
            prune_checkpoints(self.output_dir, self.config.checkpoints_total_limit)

    def _truncate_log(self) -> None:
        """Drop the lines that the resumed run will write again."""
        path = self.output_dir / "log.jsonl"
        if path.is_file():
            lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= self.state.step]
            write_text(path, "".join(f"{line}\n" for line in lines))


@contextmanager
def _interruptible() -> Iterator:
    """Ctrl-C and SIGTERM ask the loop to stop after the current step; a second Ctrl-C stops at once."""
    received: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are someone else's
        previous = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextmanager
def _log_writer(config: TrainConfig, output_dir: Path | None) -> Iterator:
    """Appends rows to log.jsonl and, if asked for, to TensorBoard."""
    if output_dir is None:
        yield lambda row: None
        return
    board = None
    if config.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        try:
            board = SummaryWriter(output_dir / config.logging_dir)
        except OSError as error:
            raise UserError(f"logging_dir {config.logging_dir} cannot be written: {error.strerror or error}") from error
    with (output_dir / "log.jsonl").open("a") as file:

        def write(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            for name, value in row.items() if board else ():
                if value is not None:
                    board.add_scalar(name, value, row["step"])

        yield write
    if board:
        board.close()
