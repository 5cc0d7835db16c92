"""Everything that the rest of a run depends on, in one object that a checkpoint saves and restores exactly.

Random numbers need no state: they are pure functions of the seed and the step (selfnpo/randomness.py).
"""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from selfnpo.config import TrainConfig, binding
from selfnpo.errors import UserError
from selfnpo.models import PretrainedModel
from selfnpo.training.optimizer import FusedAdamW, StepwiseAdamW, make_optimizer
from selfnpo.training.rollout import Rollout
from selfnpo.training.student import Student, make_student

_PROGRESS = ("step", "reference_evaluations", "seconds", "startup_seconds", "strategy")


@dataclass
class TrainState:
    config: TrainConfig
    base: PretrainedModel
    student: Student
    optimizer: FusedAdamW | StepwiseAdamW
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler  # scales the loss in float16; otherwise it does nothing
    rollout: Rollout
    step: int = 0
    reference_evaluations: int = 0  # guided evaluations of one sample
    seconds: float = 0.0  # wall time of training: steps and everything between them except pictures
    startup_seconds: float = 0.0  # before the first step: compilation, measurements, filling the pool
    strategy: str = ""  # chosen by selfnpo/training/tandem.py, and kept: another one would round differently
    # Seconds for which other work held up the steps, summed over all processes of the run. An upper bound: while the host is
    # busy, a GPU may still have queued steps to run.
    beside: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("logging", "relative_delta", "checkpoints", "pictures"), 0.0)
    )
    moved: tuple[int, float] | None = None  # (step, relative_delta) of the last time it was computed

    @classmethod
    def start(cls, config: TrainConfig, base: PretrainedModel, rollout: Rollout) -> "TrainState":
        """A fresh run: the student equals the base."""
        student = make_student(config, base)
        scaler = torch.amp.GradScaler(base.device.type, enabled=base.dtype == torch.float16)
        optimizer = make_optimizer(config, student, scaler)
        lr_scheduler = get_scheduler(
            config.lr_scheduler,
            getattr(optimizer, "adamw", optimizer),
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        optimizer.set_rate()
        return cls(config, base, student, optimizer, lr_scheduler, scaler, rollout)

    @property
    def model(self) -> nn.Module:
        """The student as a negative model."""
        return self.student.model

    def relative_delta(self) -> float:
        """||delta|| / ||theta||: how far the student has moved from the base, as a share of its weights."""
        with self.held_up_by("relative_delta"):
            if self.moved is None or self.moved[0] != self.step:
                self.moved = self.step, self.student.relative_delta()
            return self.moved[1]

    @contextmanager
    def held_up_by(self, kind: str) -> Iterator[None]:
        """Adds the time spent in this context to `beside[kind]`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.beside[kind] += time.perf_counter() - started

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors under flat names. `restore` copies into the same tensors."""
        student = self.student
        parts = {
            "model": student.trainable,
            "model_low": student.low_halves,
            "reference_model": student.averaged,
            "reference_model_low": student.averaged_low_halves,
            "optimizer": self.optimizer.tensors(),
            "rollout": self.rollout.tensors,
        }
        return {f"{part}.{name}": tensor.detach() for part, found in parts.items() for name, tensor in found.items()}

    def scalars(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _PROGRESS} | {
            "lr_scheduler": {key: value for key, value in self.lr_scheduler.state_dict().items() if key != "lr_lambdas"},
            "scaler": self.scaler.state_dict(),
            "settings": binding(self.config),
            "beside": {**self.beside},
        }

    def restore(self, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """Continue from the tensors and scalars of a checkpoint. Its base_sha256 must equal `fingerprint`.

        Raises:
            UserError: the checkpoint is from a run with different settings or another base.
        """
        for name, value in binding(self.config).items():
            if scalars["settings"].get(name) != value:
                raise UserError(
                    f"the checkpoint was made with {name} = {scalars['settings'].get(name)}, got {value}; "
                    "resume with the run's own config.yaml, or start in another output_dir"
                )
        if scalars["base_sha256"] != self.fingerprint:
            raise UserError(
                f"the checkpoint was made from other weights than {self.config.pretrained_model_name_or_path}; "
                "resume with the base that the run started from, or start in another output_dir"
            )
        moments = {
            name.removeprefix("optimizer."): value for name, value in tensors.items() if name.startswith("optimizer.")
        }
        self.optimizer.restore(moments)
        for name, value in self.tensors().items():
            if not name.startswith("optimizer."):
                value.copy_(tensors[name])
        self.lr_scheduler.load_state_dict(scalars["lr_scheduler"] | {"lr_lambdas": [None]})
        for group, rate in zip(self.lr_scheduler.optimizer.param_groups, scalars["lr_scheduler"]["_last_lr"], strict=True):
            group["lr"] = rate
        self.optimizer.set_rate()
        self.scaler.load_state_dict(scalars["scaler"])
        for name in _PROGRESS:
            setattr(self, name, scalars[name])
        self.moved = None
        self.beside |= scalars.get("beside", {})  # older checkpoints do not have it

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the base's weights, which training never changes."""
        own = {id(tensor) for tensor in (*self.student.trainable.values(), *self.student.averaged.values())}
        digest = hashlib.sha256()
        for parameter in self.base.denoiser.parameters():
            if id(parameter) not in own:
                digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()
