"""One training step on the device, and the preparation before the first one."""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from selfnpo.device import device_name, seconds_of
from selfnpo.errors import UserError
from selfnpo.schedule import Grid, make_schedule
from selfnpo.training.attention import choice_lines, choose_attention, spare_single_keys
from selfnpo.training.capture import Replayed
from selfnpo.training.objective import TruncatedObjective
from selfnpo.training.rollout import RolloutBatch
from selfnpo.training.state import TrainState
from selfnpo.training.supported import capture_obstacle, strategies
from selfnpo.training.tandem import Tandem, fastest

# Relative difference allowed between compiled and plain gradients. Observed: 2e-6 in float32; 0.17 in bfloat16, for a
# single draw on a model whose loss is nearly 0; 0.46 with a compiler bug.
COMPILED_ERROR = {torch.float32: 0.02, torch.bfloat16: 0.25, torch.float16: 0.25}
DRAWS = 3  # of times and noise, over which the difference is measured


class TrainingStep:
    """Rollout, jump, reference and student, loss, optimizer. A call advances the tensors of `state` and returns (loss,
    gradient norm) without waiting for the device."""

    def __init__(self, state: TrainState, grid: Grid):
        self.state, self.config, self.base = state, state.config, state.base
        config, base = self.config, self.base
        self.objective = TruncatedObjective(
            base,
            make_schedule(base.scheduler),
            grid,
            kind=config.loss,
            weighting=config.loss_weighting,
            huber_c=config.huber_c,
            condition_dropout=config.condition_dropout,
            seed=config.seed,
        )
        self.tandem = self._tandem("sequential")
        # A copy of `state.step` on the device where the rollout reads it; a captured graph reads it too.
        self.counter = torch.zeros((), dtype=torch.int64, device=state.rollout.index_device)
        self.evaluations = 0  # of the reference, in the last step
        self._execute: Callable[[], tuple[Tensor, ...]] | None = None

    def __call__(self) -> tuple[Tensor, Tensor]:
        self.prepare()
        self.counter.fill_(self.state.step)
        return self._execute()

    def _step(self) -> tuple[Tensor, ...]:
        """The device's work of one step; returns (loss, gradient norm). It may be captured in a graph."""
        state, rollout = self.state, self.state.rollout
        with torch.no_grad():
            batch = rollout.draw(state.student.reference, self.counter)
        self.evaluations = batch.evaluations  # the same in every step that is captured
        losses = []
        for part in batch.split(self.config.train_batch_size):
            loss, prev_sample = self._backward(self.tandem, part)
            if prev_sample is not None:
                rollout.advance(part, prev_sample)
            if self.config.gradient_accumulation_steps > 1:
                state.optimizer.accumulate()
            losses.append(loss)
        return sum(losses), state.optimizer.step()

    def _backward(self, tandem: Tandem, batch: RolloutBatch) -> tuple[Tensor, Tensor | None]:
        """Runs forward and backward on a micro-batch. Returns its loss and the next states of its trajectories."""
        asked = self.objective.jump(batch, self.counter)
        with tandem(batch, asked) as (target, prev_sample, model_output):
            loss = self.objective.loss(asked, model_output, target) / self.config.gradient_accumulation_steps
            self.state.scaler.scale(loss).backward()
        return loss.detach(), prev_sample

    def prepare(self) -> None:
        """Choose attention kernels, fill the pool, compile, choose how reference and student share a step. Runs once."""
        if self._execute is not None:
            return
        state, config, device = self.state, self.config, self.base.device
        started = time.perf_counter()
        self.counter.fill_(state.step)
        if config.attention == "auto":
            self._choose_attention()
        if state.step == 0:  # before compiling, because its batches vary in size
            state.reference_evaluations += state.rollout.fill(state.student.reference)
        if config.compile:
            self._compile()
        arms = {name: self._tandem(name) for name in self._strategies()}
        probes = {name: partial(self._probe, arm) for name, arm in arms.items()}
        state.strategy = fastest(probes, self._machine_and_run, device)
        state.optimizer.zero_grad()  # left over from a probe that failed
        self.tandem = arms[state.strategy]
        self._execute = self._step
        if device.type == "cuda" and config.capture != "off":
            reason = capture_obstacle(config, device) or state.rollout.obstacle
            if reason:
                print(f"steps are not captured in a CUDA graph: {reason}")
            else:
                self._execute = Replayed(self._step, state.optimizer.zero_grad)
        state.startup_seconds += time.perf_counter() - started

    def release(self) -> None:
        """Free the memory that a captured graph reserves. Another step would prepare again."""
        self._execute = None
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()

    def _choose_attention(self) -> None:
        for network in self.state.student.networks():
            if self.base.device.type == "cuda":
                print(choice_lines(choose_attention(network, lambda: self._probe(self.tandem))))
            else:
                spare_single_keys(network, partial(self._one_sample, network))

    def _compile(self) -> None:
        plain = self._gradient_norms()
        self.state.student.compile(static=self.config.rollout == "pool")
        self.objective.compile()
        self.state.rollout.compile()
        first, again = (seconds_of(lambda: self._probe(self.tandem), self.base.device) for _ in range(2))
        print(f"compiled in {first - again:.1f} s")
        check_compiled(plain, self._gradient_norms(), self.base.dtype)

    def _tandem(self, strategy: str) -> Tandem:
        return Tandem(self.state.student, self.state.rollout.reference, self.base, strategy)

    def _strategies(self) -> list[str]:
        config, possible = self.config, strategies(self.config, self.base.device)
        if self.state.rollout.reference is None:
            return ["sequential"]
        if config.tandem != "auto":
            return [config.tandem]
        return [self.state.strategy] if self.state.strategy in possible else possible  # a resumed run keeps its strategy

    def _machine_and_run(self) -> str:
        """A key of everything that the choice between strategies depends on."""
        config, base = self.config, self.base
        of_model = type(base.denoiser).__name__, sum(parameter.numel() for parameter in base.denoiser.parameters())
        of_run = config.train_batch_size, *base.sample_shape, base.dtype, config.rank, config.compile
        return " ".join(map(str, (device_name(base.device), torch.__version__, *of_model, *of_run)))

    def _probe(self, tandem: Tandem) -> tuple[Tensor, ...]:
        """Forward and backward passes of one micro-batch that change no state."""
        loss, _ = self._backward(tandem, self._made_up())
        self.state.optimizer.zero_grad()
        return (loss,)

    def _gradient_norms(self) -> Tensor:
        """The gradient norm of every trained tensor, for each of a few draws."""
        norms = []
        for draw in range(DRAWS):
            self.counter.fill_(draw)
            self._backward(self.tandem, self._made_up())
            grads = [weight.grad for weight in self.state.student.trainable.values()]
            norms += [self.base.move(torch.zeros(())) if grad is None else grad.float().norm() for grad in grads]
            self.state.optimizer.zero_grad()
        self.counter.fill_(self.state.step)
        return torch.stack(norms)

    def _made_up(self) -> RolloutBatch:
        size, base = self.config.train_batch_size, self.base
        condition = torch.zeros(size, dtype=torch.int64, device=self.counter.device)
        position = condition + self.config.num_inference_steps // 2  # at the noisiest position the loss is 0
        sample = torch.ones(size, *base.sample_shape, device=base.device)
        return RolloutBatch(sample, None if self.state.rollout.reference else sample, position, condition, 0)

    @torch.no_grad()
    def _one_sample(self, network: nn.Module) -> Tensor:
        sample, zero = torch.ones(1, *self.base.sample_shape, device=self.base.device), torch.zeros(1, dtype=torch.int64)
        return self.base.predict(network, sample, zero, zero)


def check_compiled(plain: Tensor, compiled: Tensor, dtype: torch.dtype) -> None:
    """Check that compiled networks have the same gradients as plain ones. Compilers have bugs that the loss does not show.

    Args:
        plain, compiled: gradient norms of the trained tensors, without and with torch.compile.
        dtype: dtype that the networks compute in.

    Raises:
        UserError: they differ by more than rounding explains.
    """
    difference, whole = (norms.norm().item() for norms in (compiled - plain, plain))
    if not difference <= COMPILED_ERROR[dtype] * whole:
        raise UserError(
            f"compile is on, but torch {torch.__version__} compiles this model wrongly here: its gradients differ by "
            f"{difference:.3g} from those of the plain model, whose norm is {whole:.3g}; leave --compile out"
        )
