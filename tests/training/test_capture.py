"""What makes a step safe to capture in a CUDA graph, watched on a CPU: the same operations on the same memory every time."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from runs import RANKS, settings, start
from selfnpo.config import TrainConfig
from selfnpo.training.capture import Recorder, Replayed, difference
from selfnpo.training.trainer import Trainer

LATENT = (3, 4, 8, 8)  # a batch of the tiny Stable Diffusion


def watched(trainer: Trainer) -> str:
    """Why two steps in a row would not make one graph."""
    recorders = []
    for _ in range(2):
        recorders.append(Recorder())
        trainer.step.counter.fill_(trainer.state.step)
        with recorders[-1]:
            trainer.step._execute()
        trainer.state.step += 1
    return difference(*recorders)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("family", ["stable_diffusion", "class_conditional"])
def test_a_step_is_the_same_every_time(models, family, rank, precision):
    config = settings(models(family), rank=rank, mixed_precision=precision, rollout_guidance_scale=2.0)
    trainer = start(replace(config, gradient_accumulation_steps=2))
    for _ in range(3):
        trainer.train_step()
    assert watched(trainer) == ""
    assert int(trainer.step.counter) == trainer.state.step - 1 == 4


def test_shared_passes_are_the_same_every_time(models):
    trainer = start(settings(models("stable_diffusion"), rank=2, tandem="shared"))
    trainer.train_step()
    assert watched(trainer) == ""


def rereads(trainer):
    return lambda: trainer.step.counter.item()


def draws(trainer):
    return lambda: torch.randn(3)


def counts_on_the_host(trainer):
    return lambda: trainer.step.counter.new_zeros(1) + trainer.state.step


def moves(trainer):
    trainer.kept = []  # two tensors alive at once lie apart

    def fault():
        trainer.kept.append(torch.ones(5))
        trainer.after = trainer.kept[-1]

    def use():
        return trainer.after + 1

    return fault, use


def copies(trainer):
    return lambda: torch.tensor([1.0, 2.0])


def grows(trainer):
    return lambda: [trainer.step.counter + 0 for _ in range(trainer.state.step)]


@pytest.mark.parametrize(
    ("break_", "reason"),
    [
        (rereads, "_local_scalar_dense reads a value from the device"),
        (draws, "randn draws random numbers from a generator that the host advances"),
        (counts_on_the_host, "add takes 1, then 2"),
        (moves, "add finds its operand at another address"),
        (copies, "lift_fresh makes a tensor from values on the host"),
        (grows, "floor_divide in one step is add in the next"),
    ],
)
def test_what_a_graph_could_not_repeat_is_found(demo, break_, reason):
    trainer = Trainer(TrainConfig(train_batch_size=4, pool_size=1), demo)
    trainer.train_step()
    fault, execute = break_(trainer), trainer.step._step
    outside, inside = fault if isinstance(fault, tuple) else (lambda: None, fault)

    def step():
        with torch.utils._python_dispatch._disable_current_modes():
            outside()
        inside()
        return execute()

    trainer.step._execute = step
    with pytest.raises(AssertionError, match=reason):
        assert watched(trainer) == ""


class LatentOps(TorchDispatchMode):
    """Operations on latents, outside of the networks."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        touched = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
        is_view = not op._schema.is_mutable and any(value.alias_info for value in op._schema.returns)
        if any(leaf.shape[-4:] == LATENT for leaf in touched) and not is_view:
            self.names.append(op.overloadpacket.__name__)
        return result


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_eight_launches_do_the_latent_work_of_a_step(models, monkeypatch, precision, scale):
    config = settings(
        models("stable_diffusion"), train_batch_size=3, mixed_precision=precision, rollout_guidance_scale=scale
    )
    trainer = start(config)
    trainer.train_step()
    family, weight = trainer.base.family, next(iter(trainer.state.student.trainable.values()))

    def call(denoiser, sample, timesteps, conditions):
        with torch.utils._python_dispatch._disable_current_modes():  # a network, whose work is its own
            output = torch.ones_like(sample)
        return _Network.apply(weight, output)

    monkeypatch.setattr(type(family), "call", staticmethod(call))
    with LatentOps() as ops:
        trainer.step()
    launches = [name for name in ops.names if name != "_to_copy"]  # in bfloat16 each network rounds its own input
    assert len(launches) <= 8, launches
    assert len(ops.names) - len(launches) <= (2 if precision == "bf16" else 0)
    assert {"forward_jump", "guided_step", "x0_loss", "x0_loss_backward"} <= set(ops.names)


class _Network(torch.autograd.Function):
    """Takes a gradient and needs nothing for it."""

    @staticmethod
    def forward(ctx, weight, output):
        ctx.like = weight
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros_like(ctx.like), None


class FakeStream:
    def wait_stream(self, other):
        pass


@pytest.mark.parametrize("fault", ["", "watched", "capture"])
def test_watched_then_warmed_up_then_replayed(monkeypatch, capsys, fault):
    """The life of a captured step, with graphs that are pretended."""
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr("selfnpo.training.capture.on_stream", lambda stream, step: step())
    made = []

    def capture(step, pool, stream):
        if fault == "capture":
            raise RuntimeError("operation not permitted when stream is capturing\nand so on")
        made.append((pool, stream))
        return lambda: ("replayed",)

    monkeypatch.setattr("selfnpo.training.capture.capture", capture)
    taken, cleared = [], []

    def step():
        taken.append(torch.ones(2) + (len(taken) if fault == "watched" else 0))
        return ("taken",)

    replayed = Replayed(step, lambda: cleared.append(True))
    outputs = [replayed()[0] for _ in range(8)]
    said = capsys.readouterr().out
    if fault:
        assert outputs == ["taken"] * 8
        assert bool(cleared) == (fault == "capture")
        reason = "add takes 0, then 1" if fault == "watched" else "operation not permitted when stream is capturing"
        assert said == f"steps are not captured in a CUDA graph: {reason}\n"
    else:
        assert outputs == ["taken"] * 5 + ["replayed"] * 3
        assert made == [("pool", replayed.stream)]
        assert not said
