"""Rollouts of the reference model, truncated at some time t: where training samples come from.

    name    starts from                    stops at                  reference evaluations per sample
    pool    wherever its trajectory is     after one step            1, plus some before the first step
    fresh   noise                          a random grid point       1 .. N, (N + 1) / 2 on average
    full    noise                          the clean sample          N
    data    a noised real image            K steps later             K + 1, fewer near the end

The evaluation that advances a `pool` trajectory by one step also gives its Tweedie target. A trajectory that reaches the end
restarts from fresh noise under a new condition.

Positions index the sampling grid: 0 is the noisiest point, N the clean end. An evaluation is one guided evaluation of one
sample. It costs two rows of a batch unless the guidance scale is 0 or 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from selfnpo.config import TrainConfig
from selfnpo.inputs.data import TrainData, encode_data
from selfnpo.models import PretrainedModel
from selfnpo.progress import progress
from selfnpo.randomness import Site, draw_index
from selfnpo.schedule import Grid, step_rows
from selfnpo_kernels import forward_jump, guided_step, philox_normal


@dataclass(frozen=True)
class RolloutBatch:
    """Truncated rollouts: a batch, or a part of one."""

    sample: Tensor  # x_t [B, ...]
    target: Tensor | None  # [B, ...] the reference's estimate of x_0 at x_t; None if the step has yet to compute it
    position: Tensor  # [B] grid position of t
    condition: Tensor  # [B]
    evaluations: int  # guided evaluations of the reference for the whole batch
    slot: Tensor | None = None  # [1] index of the batch in the pool
    first: int = 0  # index of the first sample in the whole batch

    def split(self, size: int) -> Iterator["RolloutBatch"]:
        """Parts of at most `size` samples."""
        for first in range(0, len(self.sample), size):
            part = slice(first, first + size)
            target = None if self.target is None else self.target[part]
            yield replace(
                self, sample=self.sample[part], target=target, position=self.position[part],
                condition=self.condition[part], first=first,
            )  # fmt: skip

    def ids(self, device: torch.device) -> Tensor:
        """The indices of the samples in the whole batch: int64 `[B]`."""
        return torch.arange(self.first, self.first + len(self.sample), device=device)


class Reference:
    """Guided DDIM steps of a reference model along the grid."""

    def __init__(self, base: PretrainedModel, grid: Grid, guidance_scale: float, micro_batch: int | None = None):
        """`micro_batch`: samples per forward pass; by default all."""
        self.base, self.guidance_scale, self.micro_batch = base, guidance_scale, micro_batch
        self.timesteps, self.rows = grid.timesteps.float().to(base.device), step_rows(grid).to(base.device)
        # For arithmetic it is kept in device memory, like everything that a captured graph reads.
        self.scale = torch.full((1,), guidance_scale, device=base.device)

    def evaluate(
        self, denoiser: nn.Module, sample: Tensor, position: Tensor, condition: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The model outputs (cond, uncond) at grid `position` `[B]`, for `move_on`."""
        timesteps = self.timesteps[self.base.move(position)]
        return self.base.predict_guided(denoiser, sample, timesteps, condition, self.guidance_scale)

    def move_on(self, sample: Tensor, position: Tensor, outputs: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
        """(prev_sample, pred_original_sample) at grid `position` `[B]`."""
        return guided_step(sample, *outputs, self.scale, self.rows[self.base.move(position)])

    def step(self, denoiser: nn.Module, sample: Tensor, position: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """`evaluate` and `move_on`, in forward passes of at most `micro_batch` samples."""
        parts = zip(
            *(tensor.split(self.micro_batch or len(sample)) for tensor in (sample, position, condition)), strict=True
        )
        stepped = [self.move_on(part[0], part[1], self.evaluate(denoiser, *part)) for part in parts]
        return stepped[0] if len(stepped) == 1 else tuple(map(torch.cat, zip(*stepped, strict=True)))

    def roll(self, denoiser: nn.Module, sample: Tensor, start: Tensor, stop: Tensor, condition: Tensor) -> RolloutBatch:
        """Take every sample from grid position `start` to `stop` `[B]` and evaluate it there; finished samples cost nothing.
        The positions are CPU tensors, because they decide how much work there is."""
        length = stop - start
        order = length.argsort(descending=True)  # so that unfinished samples always come first
        first, asked = start[order], condition[order]
        sample, target = sample[self.base.move(order)], torch.empty_like(sample)
        for k in range(int(length.max()) + 1):
            under_way, moving_on = int((length >= k).sum()), int((length > k).sum())
            prev, target[:under_way] = self.step(denoiser, sample[:under_way], first[:under_way] + k, asked[:under_way])
            sample[:moving_on] = prev[:moving_on]
        back = self.base.move(order.argsort())
        return RolloutBatch(sample[back], target[back], stop, condition, int((length + 1).sum()))


def draw_noise(reference: Reference, seed: int, step: int | Tensor, ids: Tensor) -> Tensor:
    """x_T of the trajectories `ids` `[B]`. If `step` is a tensor, it is on the device of the samples."""
    return philox_normal((len(ids), *reference.base.sample_shape), seed, step, Site.START_NOISE, reference.base.move(ids))


def draw_condition(reference: Reference, seed: int | Tensor, step: int | Tensor, ids: Tensor) -> Tensor:
    """The conditions of the trajectories `ids` `[B]`."""
    return draw_index(0, reference.base.num_conditions, seed, step, Site.CONDITION, ids)


class Rollout:
    """A source of training samples. By default a batch is rolled out completely within one step."""

    reference: Reference | None = None  # None if targets come from elsewhere
    tensors: dict[str, Tensor]  # everything that a checkpoint must hold
    index_device = torch.device("cpu")  # where steps, positions and conditions are kept
    # Why drawing cannot be captured in a graph; empty if it can.
    obstacle = "rollouts of varying length decide on the host which samples are unfinished"

    def fill(self, denoiser: nn.Module) -> int:
        """Prepare for the first step. Returns the evaluations that this took."""
        return 0

    def draw(self, denoiser: nn.Module, step: Tensor) -> RolloutBatch:
        """The batch of `step`, one int64 number on `index_device`."""
        raise NotImplementedError

    def advance(self, batch: RolloutBatch, prev_sample: Tensor) -> None:
        """Store the next states `[B, ...]` of a batch, or part of one, that was drawn without targets."""

    def compile(self) -> None:
        """Compile what consists of many small operations."""


class TrajectoryPool(Rollout):
    """`pool_size` batches of unfinished trajectories, advanced in turn, so that consecutive batches share no trajectory.

    Every batch covers all times of the grid, as evenly as its size allows. `fill` brings all trajectories to their first
    positions, at about (N + 1) / 2 evaluations each. The samples are the only state; everything else follows from the step
    number. That is in device memory if the conditions are, and then the host needs to know nothing.
    """

    def __init__(self, reference: Reference, batch_size: int, seed: int, pool_size: int):
        self.reference, self.seed, self.pool_size = reference, seed, pool_size
        self.length = len(reference.timesteps)
        base, self.index_device = reference.base, reference.base.index_device
        slots = torch.arange(pool_size * batch_size).reshape(batch_size, pool_size).T.contiguous()
        self.slots = slots.to(self.index_device)
        self.first_position = (slots * self.length // slots.numel()).to(self.index_device)
        self.key = torch.full((1,), seed, device=self.index_device)
        self.tensors = {"sample": torch.zeros(pool_size, batch_size, *base.sample_shape, device=base.device)}
        self.obstacle = "" if self.index_device == base.device else "the encoded prompts are on the host"
        self._place = self.place

    def place(self, step: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The index `[1]` of this step's batch, and for its trajectories: ids, positions, conditions `[B]` and rows of
        `forward_jump` `[B, 2]`. Row (0, 1) replaces a finished trajectory by fresh noise, (1, 0) keeps an unfinished one."""
        turn, batch = step // self.pool_size, (step % self.pool_size).reshape(1)
        age = self.first_position.index_select(0, batch)[0] + turn
        generation, position = age // self.length, age % self.length
        ids = generation * self.slots.numel() + self.slots.index_select(0, batch)[0]
        condition = draw_condition(self.reference, self.key, 0, ids)
        restart = (position == 0).float()
        return batch, ids, position, condition, torch.stack((1 - restart, restart), dim=1)

    def compile(self) -> None:
        self._place = torch.compile(self.place, dynamic=False)

    def draw(self, denoiser: nn.Module, step: Tensor) -> RolloutBatch:
        batch, ids, position, condition, rows = self._place(step)
        move = self.reference.base.move
        slot = move(batch)
        sample = self.tensors["sample"].index_select(0, slot)[0]
        sample = forward_jump(sample, move(rows), move(self.key), 0, move(ids), Site.START_NOISE)
        return RolloutBatch(sample, None, position, condition, len(sample), slot)

    def advance(self, batch: RolloutBatch, prev_sample: Tensor) -> None:
        part = slice(batch.first, batch.first + len(prev_sample))
        self.tensors["sample"][:, part].index_copy_(0, batch.slot, prev_sample[None])

    @torch.no_grad()
    def fill(self, denoiser: nn.Module) -> int:
        evaluations = 0
        batches = zip(self.tensors["sample"], self.slots.cpu(), self.first_position.cpu(), strict=True)
        for sample, ids, position in progress(batches, desc="fill pool", total=self.pool_size, unit="batch", leave=False):
            noise = draw_noise(self.reference, self.seed, 0, ids)
            condition = draw_condition(self.reference, self.seed, 0, ids)
            rolled = self.reference.roll(denoiser, noise, torch.zeros_like(position), position, condition)
            sample.copy_(rolled.sample)
            evaluations += rolled.evaluations
        return evaluations


class NoiseRollout(Rollout):
    """From fresh noise to a random grid point (`fresh`), or all the way to a clean sample (`full`)."""

    def __init__(self, reference: Reference, batch_size: int, seed: int, full: bool):
        self.reference, self.seed, self.full = reference, seed, full
        self.ids = torch.arange(batch_size)
        self.tensors = {}

    def draw(self, denoiser: nn.Module, step: Tensor) -> RolloutBatch:
        length, ids = len(self.reference.timesteps), self.ids
        condition = draw_condition(self.reference, self.seed, step, ids)
        noise = draw_noise(self.reference, self.seed, self.reference.base.move(step), ids)
        stop = torch.full_like(ids, length - 1) if self.full else draw_index(0, length, self.seed, step, Site.STOP, ids)
        batch = self.reference.roll(denoiser, noise, torch.zeros_like(ids), stop, condition)
        if self.full:
            return replace(batch, sample=batch.target, position=torch.full_like(ids, length))
        return batch


class DataRollout(Rollout):
    """From real images noised to a random grid time, then K = `num_rollout_steps` steps: the released recipe. Needs data."""

    def __init__(
        self,
        reference: Reference,
        batch_size: int,
        seed: int,
        grid: Grid,
        images: Tensor,
        conditions: Tensor,
        num_rollout_steps: int,
    ):
        """`images` `[n, ...]` (latents, for a latent model) and their `conditions` `[n]`, both on the CPU."""
        self.reference, self.seed = reference, seed
        self.images, self.conditions, self.num_rollout_steps = images, conditions, num_rollout_steps
        self.rows = torch.stack((grid.alpha[:-1], grid.sigma[:-1]), dim=1).float()  # from a clean image to each grid point
        self.ids = torch.arange(batch_size)
        self.tensors = {}

    def draw(self, denoiser: nn.Module, step: Tensor) -> RolloutBatch:
        length, ids, move = len(self.reference.timesteps), self.ids, self.reference.base.move
        image = draw_index(0, len(self.images), self.seed, step, Site.IMAGE, ids)
        start = draw_index(0, length, self.seed, step, Site.START, ids)
        clean, rows = move(self.images[image]), move(self.rows[start])
        noised = forward_jump(clean, rows, self.seed, move(step), move(ids), Site.START_NOISE)
        stop = (start + self.num_rollout_steps).clamp(max=length - 1)
        return self.reference.roll(denoiser, noised, start, stop, self.conditions[image])


def make_rollout(config: TrainConfig, base: PretrainedModel, grid: Grid, data: TrainData | None = None) -> Rollout:
    """The rollout that the settings ask for. Without `data`, the demo's digits serve as real images."""
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
    from selfnpo.inputs.digits import halves  # scikit-learn is slow to import

    digits, _ = halves()
    return digits.images, digits.labels
