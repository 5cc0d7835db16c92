"""Every random number in the project is a pure function of (seed, step, site, sample id).

There is no generator state: a resumed run, another device or another split of the batch draws the same numbers. A site
stands for a purpose, so two purposes never share a number.
"""

from enum import IntEnum

from torch import Tensor

from selfnpo_kernels.philox import philox_uniform


class Site(IntEnum):
    START_NOISE = 1  # x_T of a trajectory
    CONDITION = 2  # the prompt or label of a trajectory
    START = 3  # where a rollout from data starts
    STOP = 4  # where a fresh rollout stops
    IMAGE = 5  # which image a rollout from data starts from
    JUMP_TIME = 6  # s
    JUMP_NOISE = 7  # from x_t to x_s
    DROPOUT = 8  # whether the student's condition is replaced by the null condition
    SAMPLE_NOISE = 9  # x_T of a sample, independent of the training trajectories
    PERTURBATION = 10  # the random baseline of the evaluation


def draw_index(
    low: Tensor | int, high: Tensor | int, seed: int | Tensor, step: int | Tensor, site: Site, sample_ids: Tensor
) -> Tensor:
    """Uniform integers in [low, high), one per sample id: int64 `[B]`; `low` if the interval is empty."""
    width = high - low
    width = width.clamp(min=1) if isinstance(width, Tensor) else max(width, 1)
    return low + (philox_uniform(seed, step, site, sample_ids) * width).floor().long()
