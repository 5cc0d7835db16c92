"""AdamW: PyTorch's own, or with its moments in 8 bits that of bitsandbytes."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from selfnpo.config import TrainConfig

MIN_8BIT_SIZE = 4096  # elements; the moments of smaller parameters stay in float32


def make_optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    options = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit  # an extra

        return AdamW8bit(parameters, min_8bit_size=MIN_8BIT_SIZE, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)


def moment_bytes(config: TrainConfig, parameter: Tensor) -> int:
    """What the optimizer keeps for one parameter."""
    if config.use_8bit_adam and parameter.numel() >= MIN_8BIT_SIZE:
        return 2 * (parameter.numel() + 4 * -(-parameter.numel() // 256))  # a float32 scale for every 256 elements
    return 8 * parameter.numel()


def start_state(optimizer: torch.optim.Optimizer) -> None:
    """The state that the first step would make, for a checkpoint to be copied into."""
    for group_number, group in enumerate(optimizer.param_groups):
        for number, parameter in enumerate(group["params"]):
            if hasattr(optimizer, "init_state"):
                optimizer.init_state(group, parameter, group_number, number)
            else:
                step = torch.zeros((), device=parameter.device)
                moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": step} | moments


def state_tensors(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The live state of one parameter, without constants; bitsandbytes counts steps in a Python number, copied here."""
    state = {key: value for key, value in optimizer.state[parameter].items() if not key.startswith("qmap")}
    return {key: value if isinstance(value, Tensor) else torch.tensor(value) for key, value in state.items()}


def set_step(optimizer: torch.optim.Optimizer, parameter: Tensor, step: Tensor) -> None:
    """The number of steps where `state_tensors` could only copy it."""
    state = optimizer.state[parameter]
    if not isinstance(state["step"], Tensor):
        state["step"] = int(step)
