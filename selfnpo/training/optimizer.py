"""AdamW, with gradient clipping before it and the reference's moving average after it.

    form      used for                             what it does
    fused     float32 and bfloat16                 everything in one pass over memory (selfnpo_kernels.fused_adamw_)
    stepwise  float16, which needs loss scaling    clipping, PyTorch's AdamW, moving average, one after the other
              8-bit moments                        the same with the AdamW of bitsandbytes

The fused form keeps nothing on the host that changes from step to step.
"""

from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from selfnpo.config import TrainConfig
from selfnpo.training.student import Student
from selfnpo_kernels import fused_adamw_

MIN_8BIT_SIZE = 4096  # elements; the moments of smaller parameters stay in float32


def make_optimizer(config: TrainConfig, student: Student, scaler: GradScaler) -> "FusedAdamW | StepwiseAdamW":
    if config.use_8bit_adam or scaler.is_enabled():
        return StepwiseAdamW(config, student, scaler)
    return FusedAdamW(config, student)


def _options(config: TrainConfig) -> dict[str, Any]:
    return {
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }


class FusedAdamW(torch.optim.Optimizer):
    """`step` clips, updates weights and moving average, and returns the gradient norm. It can be captured in a graph."""

    def __init__(self, config: TrainConfig, student: Student):
        super().__init__([*student.trainable.values()], {"lr": config.learning_rate})
        self.student, self.options, self.max_grad_norm = student, _options(config), config.max_grad_norm
        self.ema_decay = config.reference_decay
        self.params = [*student.trainable.values()]
        for param in self.params:
            self.state[param] = {key: torch.zeros_like(param, dtype=torch.float32) for key in ("exp_avg", "exp_avg_sq")}
        device = self.params[0].device
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.lr = torch.zeros(1, device=device)
        self.sums: dict[Tensor, Tensor] = {}
        self._known_columns: dict[tuple[bool, ...], dict[str, list[Tensor]]] = {}

    def set_rate(self) -> None:
        """Copy the next step's learning rate from the host. Not part of a captured step."""
        self.lr.fill_(self.param_groups[0]["lr"])

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add up the gradients of several backward passes; bfloat16 ones are summed in float32."""
        found = {param: param.grad for param in self.params if param.grad is not None}
        if self.student.low_halves:
            if self.sums:
                torch._foreach_add_([*self.sums.values()], [*found.values()])
            else:
                self.sums = {param: grad.float() for param, grad in found.items()}
            super().zero_grad()

    @torch.no_grad()
    def step(self) -> Tensor:
        found = self.sums or {param: param.grad for param in self.params if param.grad is not None}
        grads = [*found.values()]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)))
        self.count.add_(1)
        fused_adamw_(
            grads=grads, **self._columns(tuple(param in found for param in self.params)), step=self.count, lr=self.lr,
            grad_scale=(self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0), ema_decay=self.ema_decay, **self.options,
        )  # fmt: skip
        if not self.student.is_averaged_here:
            self.student.average(self.ema_decay)
        self.zero_grad()
        return norm

    def _columns(self, used: tuple[bool, ...]) -> dict[str, list[Tensor]]:
        """All tensors except gradients, for the parameters that have gradients."""
        if used not in self._known_columns:
            student, averaged = self.student, self.student.is_averaged_here
            columns = {
                "params": self.params,
                "exp_avgs": [self.state[param]["exp_avg"] for param in self.params],
                "exp_avg_sqs": [self.state[param]["exp_avg_sq"] for param in self.params],
                "lows": [*student.low_halves.values()],
                "emas": [*student.averaged.values()] if averaged else [],
                "ema_lows": [*student.averaged_low_halves.values()] if averaged else [],
            }
            self._known_columns[used] = {name: [*compress(tensors, used)] for name, tensors in columns.items()}
        return self._known_columns[used]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.sums = {}

    def tensors(self) -> dict[str, Tensor]:
        """The live state, for a checkpoint."""
        names = self.student.trainable.items()
        return {"count": self.count} | {
            f"{name}.{key}": value for name, param in names for key, value in self.state[param].items()
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, value in self.tensors().items():
            value.copy_(tensors[name])


class StepwiseAdamW:
    """The same interface around the AdamW of PyTorch or bitsandbytes."""

    def __init__(self, config: TrainConfig, student: Student, scaler: GradScaler):
        self.student, self.scaler, self.config = student, scaler, config
        self.params = [*student.trainable.values()]
        options = _options(config) | {"lr": config.learning_rate}
        if config.use_8bit_adam:
            from bitsandbytes.optim import AdamW8bit  # an optional dependency

            self.adamw = AdamW8bit(self.params, min_8bit_size=MIN_8BIT_SIZE, **options)
        else:
            self.adamw = torch.optim.AdamW(self.params, fused=True, **options)

    def set_rate(self) -> None:
        pass  # the scheduler has set it

    def accumulate(self) -> None:
        pass  # PyTorch does it, in float32

    def step(self) -> Tensor:
        self.scaler.unscale_(self.adamw)
        norm = nn.utils.clip_grad_norm_(self.params, self.config.max_grad_norm)
        self.scaler.step(self.adamw)
        self.scaler.update()
        self.adamw.zero_grad()
        self.student.average(self.config.reference_decay)
        return norm

    def zero_grad(self) -> None:
        self.adamw.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """The live state without constants. bitsandbytes counts steps in a Python number, which is copied into a tensor."""
        found = {}
        for name, param in self.student.trainable.items():
            state = {key: value for key, value in self.adamw.state[param].items() if not key.startswith("qmap")}
            found |= {
                f"{name}.{key}": value if isinstance(value, Tensor) else torch.tensor(value) for key, value in state.items()
            }
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self._start()
        for name, value in self.tensors().items():
            value.copy_(tensors[name])
        for name, param in self.student.trainable.items():
            state = self.adamw.state[param]
            if not isinstance(state["step"], Tensor):
                state["step"] = int(tensors[f"{name}.step"])

    def _start(self) -> None:
        """Create the state that the first step would create."""
        for group_number, group in enumerate(self.adamw.param_groups):
            for number, param in enumerate(group["params"]):
                if hasattr(self.adamw, "init_state"):
                    self.adamw.init_state(group, param, group_number, number)
                else:
                    moments = {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
                    self.adamw.state[param] = {"step": torch.zeros((), device=param.device)} | moments


def moment_bytes(config: TrainConfig, parameter: Tensor) -> int:
    """Bytes that the optimizer keeps for one parameter."""
    if config.use_8bit_adam and parameter.numel() >= MIN_8BIT_SIZE:
        return 2 * (parameter.numel() + 4 * -(-parameter.numel() // 256))  # one float32 scale per 256 elements
    return 8 * parameter.numel()
