"""Everything that the future of a run depends on, in one object that a checkpoint saves and restores exactly.

Random numbers are absent: they are pure functions of the seed and the step (selfnpo/randomness.py).
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from selfnpo.config import TrainConfig, binding
from selfnpo.errors import UserError
from selfnpo.models import PretrainedModel
from selfnpo.optimizer import make_optimizer, set_step, start_state, state_tensors
from selfnpo.rollout import Rollout
from selfnpo.student import Student, make_student

_COUNTERS = ("step", "reference_evaluations", "seconds")


@dataclass
class TrainState:
    config: TrainConfig
    base: PretrainedModel
    student: Student
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler  # of the loss, in float16; otherwise it does nothing
    rollout: Rollout
    step: int = 0
    reference_evaluations: int = 0  # guided evaluations of one sample
    seconds: float = 0.0  # wall time spent in training steps

    @classmethod
    def start(cls, config: TrainConfig, base: PretrainedModel, rollout: Rollout) -> "TrainState":
        """A fresh run: the student equals the base."""
        student = make_student(config, base)
        optimizer = make_optimizer(config, student.trainable.values())
        lr_scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        scaler = torch.amp.GradScaler(base.device.type, enabled=base.dtype == torch.float16)
        return cls(config, base, student, optimizer, lr_scheduler, scaler, rollout)

    @property
    def model(self) -> nn.Module:
        """The student as a negative model."""
        return self.student.model

    def relative_delta(self) -> float:
        """||delta|| / ||theta||: how far the student has moved from the base, as a share of its weights."""
        return self.student.relative_delta()

    def tensors(self) -> dict[str, Tensor]:
        """Live tensors under flat names; `restore` copies into the same ones."""
        found = {f"model.{name}": parameter.detach() for name, parameter in self.student.trainable.items()}
        found |= {f"reference_model.{name}": tensor.detach() for name, tensor in self.student.averaged.items()}
        for name, parameter in self.student.trainable.items():
            state = state_tensors(self.optimizer, parameter)
            found |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
        return found | {f"rollout.{name}": value for name, value in self.rollout.tensors.items()}

    def scalars(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _COUNTERS} | {
            "lr_scheduler": {key: value for key, value in self.lr_scheduler.state_dict().items() if key != "lr_lambdas"},
            "scaler": self.scaler.state_dict(),
            "settings": binding(self.config),
            "base_sha256": self.fingerprint,
        }

    def restore(self, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: the checkpoint belongs to a run with other settings or another base.
        """
        for name, value in binding(self.config).items():
            if scalars["settings"].get(name) != value:
                raise UserError(
                    f"the checkpoint was made with {name} = {scalars['settings'].get(name)}, got {value}; "
                    "resume with the run's own config.yaml, or start in another output_dir"
                )
        if scalars["base_sha256"] != self.fingerprint:
            raise UserError(f"the checkpoint was made from other weights than {self.config.pretrained_model_name_or_path}")
        start_state(self.optimizer)
        for name, value in self.tensors().items():
            value.copy_(tensors[name])
        for name, parameter in self.student.trainable.items():
            set_step(self.optimizer, parameter, tensors[f"optimizer.{name}.step"])
        self.lr_scheduler.load_state_dict(scalars["lr_scheduler"] | {"lr_lambdas": [None]})
        for group, rate in zip(self.optimizer.param_groups, scalars["lr_scheduler"]["_last_lr"], strict=True):
            group["lr"] = rate
        self.scaler.load_state_dict(scalars["scaler"])
        for name in _COUNTERS:
            setattr(self, name, scalars[name])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the base's weights, which training leaves as they are."""
        own = {id(tensor) for tensor in (*self.student.trainable.values(), *self.student.averaged.values())}
        digest = hashlib.sha256()
        for parameter in self.base.denoiser.parameters():
            if id(parameter) not in own:
                digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()
