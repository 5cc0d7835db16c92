"""One training step on the device, and what precedes the first one."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from selfnpo.device import device_name, seconds_of
from selfnpo.errors import UserError
from selfnpo.schedule import make_grid, make_schedule
from selfnpo.training.attention import choice_lines, choose_attention, spare_single_keys
from selfnpo.training.capture import Replayed
from selfnpo.training.objective import Jumped, TruncatedObjective
from selfnpo.training.rollout import Truncated
from selfnpo.training.state import TrainState
from selfnpo.training.supported import capture_obstacle, strategies
from selfnpo.training.tandem import Tandem, choose

# Share of the gradients by which compiled ones may differ. Seen: 2e-6 in float32; 0.17 in bfloat16, on a model whose loss
# is nearly 0, for a single draw; 0.46 where a compiler is wrong.
COMPILED_ERROR = {torch.float32: 0.02, torch.bfloat16: 0.25, torch.float16: 0.25}
DRAWS = 3  # of times and noise, over which it is taken


class TrainingStep:
    """Rollout, jump, student, loss, optimizer. Called, it advances the tensors of `state` and returns (loss, gradient norm)
    without waiting for the device."""

    def __init__(self, state: TrainState):
        self.state, self.config, self.base = state, state.config, state.base
        config, base = self.config, self.base
        self.objective = TruncatedObjective(
            base,
            make_schedule(base.scheduler),
            make_grid(base.scheduler, config.num_inference_steps),
            kind=config.loss,
            weighting=config.loss_weighting,
            huber_c=config.huber_c,
            condition_dropout=config.condition_dropout,
            seed=config.seed,
        )
        self.reference = state.rollout.reference
        self.tandem = Tandem(state.student, self.reference, "sequential")
        self.evaluations = 0  # of the reference in the last step
        self._execute: Callable[[], tuple[Tensor, ...]] | None = None

    def __call__(self) -> tuple[Tensor, Tensor]:
        if self._execute is None:
            self.prepare()
        return self._execute()

    def prepare(self) -> None:
        """Choose attention kernels, fill the pool, compile, choose how reference and student share a step; once."""
        if self._execute is not None:
            return
        state, config, device = self.state, self.config, self.base.device
        started = time.perf_counter()
        if config.attention == "auto":
            for network in state.student.networks():
                if device.type == "cuda":
                    print(choice_lines(choose_attention(network, lambda: self._probe(self.tandem))))
                else:
                    spare_single_keys(network, partial(self._one_sample, network))
        if state.step == 0:  # before anything is compiled, for batches of all sizes come up
            state.reference_evaluations += state.rollout.fill(state.student.reference)
        if config.compile:
            plain = self._gradient_norms()
            state.student.compile(static=config.rollout == "pool")
            self.objective.compile()
            state.rollout.compile()
            first, again = (seconds_of(lambda: self._probe(self.tandem), device) for _ in range(2))
            print(f"compiled in {first - again:.1f} s")
            check_compiled(plain, self._gradient_norms(), self.base.dtype)
        arms = {name: Tandem(state.student, self.reference, name) for name in self._strategies()}
        probes = {name: partial(self._probe, arm) for name, arm in arms.items()}
        state.strategy = choose(probes, self._key, device)
        state.optimizer.zero_grad()  # what a probe left that could not run
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
        """Give back the memory that a captured graph reserves; a further step would be prepared anew."""
        self._execute = None
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()

    def _strategies(self) -> list[str]:
        config, possible = self.config, strategies(self.config, self.base.device)
        if self.reference is None:
            return ["sequential"]
        if config.tandem != "auto":
            return [config.tandem]
        return [self.state.strategy] if self.state.strategy in possible else possible  # a resumed run goes on as it began

    def _key(self) -> str:
        """What the choice between strategies depends on."""
        config, base = self.config, self.base
        of_model = type(base.denoiser).__name__, sum(parameter.numel() for parameter in base.denoiser.parameters())
        of_run = config.train_batch_size, *base.sample_shape, base.dtype, config.rank, config.compile
        return " ".join(map(str, (device_name(base.device), torch.__version__, *of_model, *of_run)))

    def _probe(self, tandem: Tandem) -> tuple[Tensor, ...]:
        """Forward and backward passes of one micro-batch, which leave no trace."""
        loss = self._backward(tandem, self.state.counter)
        self.state.optimizer.zero_grad()
        return (loss,)

    def _gradient_norms(self) -> Tensor:
        """Of every trained tensor, for a few draws."""
        norms = []
        for draw in range(DRAWS):
            self._backward(self.tandem, torch.full_like(self.state.counter, draw))
            grads = [weight.grad for weight in self.state.student.trainable.values()]
            norms += [self.base.move(torch.zeros(())) if grad is None else grad.float().norm() for grad in grads]
            self.state.optimizer.zero_grad()
        return torch.stack(norms)

    def _backward(self, tandem: Tandem, step: Tensor) -> Tensor:
        size, base = self.config.train_batch_size, self.base
        condition = torch.zeros(size, dtype=torch.int64, device=base.books)
        position = condition + self.config.num_inference_steps // 2  # at the noisiest one the loss is 0
        sample = torch.ones(size, *base.sample_shape, device=base.device)
        batch = Truncated(sample, None if self.reference else sample, position, condition, 0)
        jumped = self.objective.jump(batch, step)
        with self._evaluated(tandem, batch, slice(None), jumped, []) as (target, model_output):
            loss = self.objective.loss(jumped, model_output, target)
            loss.backward()
        return loss.detach()

    @torch.no_grad()
    def _one_sample(self, network: nn.Module) -> Tensor:
        sample, zero = torch.ones(1, *self.base.sample_shape, device=self.base.device), torch.zeros(1, dtype=torch.int64)
        return self.base.predict(network, sample, zero, zero)

    def _step(self) -> tuple[Tensor, ...]:
        """What the device does in one step: (loss, gradient norm). It may be captured in a graph."""
        state, config, rollout = self.state, self.config, self.state.rollout
        step = state.step if rollout.obstacle else state.counter
        with torch.no_grad():
            batch = rollout.draw(state.student.reference, step)
        self.evaluations = batch.evaluations  # the same in every step that is captured
        losses, moved = [], []
        for start in range(0, config.total_batch_size, config.train_batch_size):
            part = slice(start, start + config.train_batch_size)
            with torch.no_grad():
                jumped = self.objective.jump(batch, step, part)
            with self._evaluated(self.tandem, batch, part, jumped, moved) as (target, model_output):
                loss = self.objective.loss(jumped, model_output, target) / config.gradient_accumulation_steps
                state.scaler.scale(loss).backward()
            if config.gradient_accumulation_steps > 1:
                state.optimizer.accumulate()
            losses.append(loss.detach())
        if moved:
            rollout.advance(batch, moved[0] if len(moved) == 1 else torch.cat(moved))
        grad_norm = state.optimizer.step()
        state.counter.add_(1)
        return sum(losses), grad_norm

    @contextmanager
    def _evaluated(
        self, tandem: Tandem, batch: Truncated, part: slice, jumped: Jumped, moved: list[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The target at x_t and the student's output at x_s; holds to the end of the backward pass."""
        student = self.state.student
        if batch.target is not None:
            with student.training():
                asked = jumped.sample, jumped.timesteps, jumped.condition
                yield batch.target[part], self.base.predict(student.model, *asked)
            return
        with tandem(batch, part, jumped) as (outputs, model_output):
            prev_sample, target = self.reference.move_on(batch.sample[part], batch.position[part], outputs)
            moved.append(prev_sample)
            yield target, model_output


def check_compiled(plain: Tensor, compiled: Tensor, dtype: torch.dtype) -> None:
    """Compilers have bugs that no loss shows: the gradients of compiled networks must be those of the plain ones.

    Args:
        plain, compiled: the norms of the trained tensors' gradients, without and with torch.compile.
        dtype: of the networks' arithmetic.

    Raises:
        UserError: they differ by more than rounding does.
    """
    difference, whole = (norms.norm().item() for norms in (compiled - plain, plain))
    if not difference <= COMPILED_ERROR[dtype] * whole:
        raise UserError(
            f"compile is on, but torch {torch.__version__} compiles this model wrongly here: its gradients differ by "
            f"{difference:.3g} from those of the plain model, whose norm is {whole:.3g}; leave --compile out"
        )
