"""Everything that the future of a run depends on, in one object that a checkpoint saves and restores exactly.

Random numbers are absent: they are pure functions of the seed and the step (selfnpo/randomness.py).
"""

import copy
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from torch import Tensor

from selfnpo.config import TrainConfig, binding
from selfnpo.errors import UserError
from selfnpo.models import PretrainedModel
from selfnpo.rollout import Rollout

_COUNTERS = ("step", "reference_evaluations", "seconds")


@dataclass
class TrainState:
    config: TrainConfig
    base: PretrainedModel
    model: ModelMixin  # the student
    reference_model: ModelMixin  # an exponential moving average of the student, or the base itself
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    rollout: Rollout
    step: int = 0
    reference_evaluations: int = 0  # guided evaluations of one sample
    seconds: float = 0.0  # wall time spent in training steps

    @classmethod
    def start(cls, config: TrainConfig, base: PretrainedModel, rollout: Rollout) -> "TrainState":
        """A fresh run: the student is a copy of the base."""
        model = copy.deepcopy(base.denoiser).requires_grad_(True)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
            fused=True,
        )
        lr_scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        reference_model = base.denoiser if config.reference_decay == 1 else copy.deepcopy(base.denoiser)
        return cls(config, base, model, reference_model, optimizer, lr_scheduler, rollout)

    def relative_delta(self) -> float:
        """||delta|| / ||theta||: how far the student has moved from the base, as a share of its weights."""
        theta = [parameter.detach() for parameter in self.base.denoiser.parameters()]
        delta = torch._foreach_sub([parameter.detach() for parameter in self.model.parameters()], theta)
        return (_norm(delta) / _norm(theta)).item()

    def tensors(self) -> dict[str, Tensor]:
        """Live tensors under flat names; `restore` copies into the same ones."""
        found = {f"model.{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        if self.reference_model is not self.base.denoiser:
            found |= {f"reference_model.{name}": parameter for name, parameter in self.reference_model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            found |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        return found | {f"rollout.{name}": value for name, value in self.rollout.tensors.items()}

    def scalars(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _COUNTERS} | {
            "lr_scheduler": {key: value for key, value in self.lr_scheduler.state_dict().items() if key != "lr_lambdas"},
            "settings": binding(self.config),
            "base_sha256": _fingerprint(self.base.denoiser),
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
        if scalars["base_sha256"] != _fingerprint(self.base.denoiser):
            raise UserError(f"the checkpoint was made from other weights than {self.config.pretrained_model_name_or_path}")
        for parameter in self.model.parameters():
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0)} | {
                key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")
            }
        for name, value in self.tensors().items():
            value.copy_(tensors[name])
        self.lr_scheduler.load_state_dict(scalars["lr_scheduler"] | {"lr_lambdas": [None]})
        for group, rate in zip(self.optimizer.param_groups, scalars["lr_scheduler"]["_last_lr"], strict=True):
            group["lr"] = rate
        for name in _COUNTERS:
            setattr(self, name, scalars[name])


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).norm()


def _fingerprint(model: ModelMixin) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
