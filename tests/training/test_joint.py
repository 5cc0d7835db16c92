"""One pass for reference and student: the numbers of two passes, and the backward pass of the student alone."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from runs import FAMILIES, settings
from selfnpo.inputs.data import load_base, read_data
from selfnpo.models import PretrainedModel, Source
from selfnpo.models.lora.adapters import REFERENCE, STUDENT, add_lora
from selfnpo.training.joint import Pair, joint, pair
from selfnpo.training.student import LoRAStudent, make_student


@dataclass
class Case:
    """Adapters that are not zero, and what reference and student are asked."""

    base: PretrainedModel
    student: LoRAStudent
    at_t: tuple[Any, ...]  # arguments of the family's call
    at_s: tuple[Any, ...]

    def call(self, denoiser: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
        with self.base.arithmetic(self.student.model):
            return self.base.family.call(denoiser, *arguments)

    def apart(self, adapter: str | None) -> tuple[Tensor, Tensor]:
        """Outputs of the reference with `adapter` and of the student, in two passes."""
        with torch.no_grad(), self.student.using(adapter):
            reference = self.call(self.student.weights, self.at_t)
        return reference, self.call(self.student.model, self.at_s)

    def together(self, adapter: str | None) -> Pair:
        with joint(self.student.layers.values(), STUDENT, adapter):
            return self.call(self.student.weights, pair(self.at_t, self.at_s))

    def gradients(self, model_output: Tensor) -> dict[str, Tensor]:
        """Of the student's adapters, for a loss whose gradient differs from element to element."""
        own = self.student.trainable
        found = torch.autograd.grad(model_output.float().square().sum(), [*own.values()])
        return dict(zip(own, found, strict=True))


def make_case(models, family: str, **changes) -> Case:
    config = settings(models(family), rank=2, lora_alpha=3, reference_decay=0.999, **changes)
    base = load_base(config, read_data(config, Source(config)))
    student = make_student(config, base)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in [*student.trainable.items(), *student.averaged.items()]:
        if "lora_B" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    samples = torch.randn(2, 2, *base.sample_shape, generator=generator)
    timesteps, conditions = ([700.0, 20.0], [800.0, 300.0]), ([0, 0], [base.null_condition, 0])
    at_t, at_s = (
        base.arguments(sample, torch.tensor(times), torch.tensor(condition))
        for sample, times, condition in zip(samples, timesteps, conditions, strict=True)
    )
    return Case(base, student, at_t, at_s)


@pytest.fixture(scope="module")
def case(models):
    """The case of a family, with an averaged reference, made when it is first asked for."""
    made = {}

    def of(family: str) -> Case:
        if family not in made:
            made[family] = make_case(models, family)
        return made[family]

    return of


def assert_near(got: Tensor, expected: Tensor, share: float = 1e-4) -> None:
    assert_close(got, expected, rtol=share, atol=share * expected.abs().max().item())


class Products(TorchDispatchMode):
    """Counts convolutions and products with a layer's weights."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op.overloadpacket.__name__ in ("convolution", "addmm", "mm", "addmv", "mv")
        return op(*args, **(kwargs or {}))


def flops(run):
    with FlopCounterMode(display=False) as counter:
        result = run()
    return result, counter.get_total_flops()


@pytest.mark.parametrize("adapter", [None, REFERENCE], ids=["frozen", "averaged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_two_passes_compute(case, family, adapter, monkeypatch):
    made, one = [], case(family)
    make = Pair.__init__
    monkeypatch.setattr(Pair, "__init__", lambda self, *halves: (make(self, *halves), made.append(halves))[0])
    with one.student.training():
        reference, student = one.apart(adapter)
        expected = one.gradients(student)
    for parameter in one.student.averaged.values():
        parameter.requires_grad_()  # as switching adapters may leave them
    output = one.together(adapter)
    got = one.gradients(output.student)
    assert_near(output.reference, reference)
    assert_near(output.student, student)
    for name, gradient in expected.items():
        assert gradient.any()
        assert_near(got[name], gradient)
    assert made
    assert not any(half.requires_grad for half, _ in made)
    other, _ = one.apart(REFERENCE if adapter is None else None)
    assert (reference - other).abs().max() > 1e-3 * reference.abs().max()  # the tolerance tells one adapter from another


@pytest.mark.parametrize("family", FAMILIES)
def test_its_backward_pass_is_the_students_alone(case, family):
    one = case(family)
    with one.student.training():
        (_, student), forward = flops(lambda: one.apart(REFERENCE))
        _, backward = flops(lambda: one.gradients(student))
    output, joint_forward = flops(lambda: one.together(REFERENCE))
    _, joint_backward = flops(lambda: one.gradients(output.student))
    assert backward > 0
    assert (joint_forward, joint_backward) == (forward, backward)
    if family == "cogvideox_rotary":
        return  # whose rotary embeddings are no rows of a batch
    with one.student.training():
        batch = tree_map(lambda *halves: torch.cat(halves), one.at_t, one.at_s)
        half = one.call(one.student.model, batch).chunk(2)[1]
        _, naive = flops(lambda: one.gradients(half))
    assert naive == 2 * backward


@pytest.mark.parametrize("family", ["stable_diffusion", "cogvideox"])
def test_checkpointed_blocks_compute_the_students_half_again(models, family):
    one = make_case(models, family, gradient_checkpointing=True)
    with one.student.training():
        _, student = one.apart(REFERENCE)
        expected, backward = flops(lambda: one.gradients(student))
    with joint(one.student.layers.values(), STUDENT, REFERENCE):
        output = one.call(one.student.weights, pair(one.at_t, one.at_s))
        got, joint_backward = flops(lambda: one.gradients(output.student))
    for name, gradient in expected.items():
        assert_near(got[name], gradient)
    assert 0.8 * backward < joint_backward <= backward  # frozen layers at the end of a block are left out


def test_frozen_layers_run_once_for_both(case):
    one = case("class_conditional")
    with Products() as apart:
        one.apart(None)
    with Products() as together:
        one.together(None)
    adapters = 2 * len(one.student.layers)
    assert together.count - adapters == (apart.count - adapters) / 2 > 10


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_low_precision(models, precision, dtype):
    one = make_case(models, "stable_diffusion", mixed_precision=precision)
    with one.student.training():
        reference, student = one.apart(REFERENCE)
        expected = one.gradients(student)
    output = one.together(REFERENCE)
    assert output.reference.dtype == output.student.dtype == output.dtype == student.dtype == dtype
    assert_near(output.reference, reference, 0.03)
    assert_near(output.student, student, 0.03)
    got = one.gradients(output.student)
    for name, gradient in expected.items():
        assert got[name].dtype == gradient.dtype
        assert functional.cosine_similarity(got[name].flatten(), gradient.flatten(), dim=0) > 0.99


def test_adapters_in_a_higher_precision_than_their_layer():
    layer = nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16)
    add_lora(layer, LoraConfig(r=2, target_modules=["0"]), STUDENT)
    nn.init.normal_(layer[0].lora_B[STUDENT].weight)
    reference, student = (torch.randn(3, 4, dtype=torch.bfloat16) for _ in range(2))
    expected = layer(reference), layer[0].enable_adapters(True) or layer(student)
    with joint([layer[0]], STUDENT, None):
        output = layer(pair(reference, student))
    assert output.student.dtype == torch.bfloat16
    assert_close((output.reference, output.student), expected)


def test_layers_are_as_before_afterwards_even_after_an_error(case):
    one = case("class_conditional")
    layers = one.student.layers.values()
    with pytest.raises(TypeError, match="missing"), joint(layers, STUDENT, None):
        one.base.denoiser()
    assert not any("forward" in vars(layer) for layer in layers)


def halves(*shape: int) -> tuple[Tensor, Tensor]:
    reference, student = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    return reference, student.requires_grad_()


def assert_as_apart(function, *shape: int) -> None:
    """`function` of a pair is that of its halves, and its gradient that of the student's."""
    reference, student = halves(*shape)
    with torch.no_grad():
        other = function(reference.clone())
    own, output = function(student), function(pair(reference.clone(), student))
    assert_close(output.reference, other)
    assert not output.reference.requires_grad
    assert_close(output.student, own)
    assert output.shape == own.shape
    weights = torch.randn_like(own)
    expected, got = (torch.autograd.grad((each * weights).sum(), student)[0] for each in (own, output.student))
    assert_close(got, expected)


LAYERS = {
    "linear": (1, nn.Linear(3, 5), (4, 3)),
    "linear of four dimensions": (1, nn.Linear(3, 5, bias=False), (2, 3, 4, 3)),
    "linear without a batch": (2, nn.Linear(3, 5), (3,)),
    "conv1d": (1, nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9)),
    "conv2d": (1, nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 8, 7)),
    "conv2d with circular padding": (1, nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 8, 8)),
    "conv2d with padding in words": (2, nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 8, 8)),
    "conv2d without a batch": (2, nn.Conv2d(4, 6, 3), (4, 8, 8)),
    "conv3d": (1, nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1)), (2, 4, 3, 5, 5)),
    "transposed conv2d": (2, nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_frozen_layer_runs_once_and_keeps_no_activations(kind):
    runs, layer, shape = LAYERS[kind]
    layer.requires_grad_(False)
    assert_as_apart(layer, *shape)
    kept = []
    with Products() as products, saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        output = layer(pair(*halves(*shape)))
    assert products.count == runs
    assert runs == 2 or not kept
    output.student.mul_(2)  # which views could not, and which what a layer has kept would forbid
    output.student.sum().backward()


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_frozen_layer_under_autocast(kind):
    _, layer, shape = LAYERS[kind]
    layer.requires_grad_(False)
    assert_as_apart(torch.autocast("cpu", torch.bfloat16)(lambda x: layer(x)), *shape)  # whose backward pass is outside


def test_a_layer_that_is_trained_runs_for_each_half():
    layer = nn.Linear(3, 5)
    reference, student = halves(4, 3)
    layer(student).square().sum().backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    output = layer(pair(reference, student))
    output.student.square().sum().backward()
    assert_close(layer.weight.grad, expected)
    assert not output.reference.requires_grad


def in_place(x):
    x = x * 1
    x += 1
    x[:, 0] = x[:, 1]
    x[:, 1:].mul_(x.new_tensor([2, 3, 4]))
    total = torch.zeros(3, 4)
    total += x
    return total


FUNCTIONS = {
    "in place": in_place,
    "several outputs": lambda x: torch.cat([x.chunk(2, dim=1)[1], *x.split([1, 3], dim=1)], dim=1),
    "named outputs": lambda x: x.max(dim=1).values + x.sort(dim=0).values[:, 0],
    "iteration": lambda x: sum(row * number for number, row in enumerate(x)),
    "attributes": lambda x: (
        x.new_ones(x.shape, dtype=x.dtype, device=x.device) * x * x.ndim * len(x) + x.T[0, 0] * x.size(0)
    ),
    "plain tensors": lambda x: torch.ones(4) + torch.where(x > torch.zeros(()), x, torch.full((1, 4), 2.0)),
    "keywords": lambda x: functional.layer_norm(input=x, normalized_shape=(4,), weight=torch.arange(4.0)),
    "attention": lambda x: functional.scaled_dot_product_attention(x[None], x[None], value=x[None]),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functions_of_a_pair(kind):
    assert_as_apart(FUNCTIONS[kind], 3, 4)


def test_structures():
    one, other = ({"a": (torch.zeros(2), None), "b": [torch.zeros(1)], "c": number} for number in (1, 2))
    both = pair(one, other)
    assert both["a"][0].student is other["a"][0]
    assert both["a"][0].reference is one["a"][0]
    assert isinstance(both["b"][0], Pair)
    assert (both["a"][1], both["c"]) == (None, 2)


def test_what_a_pair_cannot_do():
    both = pair(torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"one shape, got \(2,\) and \(3,\)"):
        pair(torch.zeros(2), torch.zeros(3))
    for write in (
        lambda: torch.zeros(2).add_(both),
        lambda: torch.zeros(3, 2).__setitem__(0, both),
        lambda: torch.add(both, 1, out=torch.zeros(2)),
    ):
        with pytest.raises(TypeError, match="would write both halves of a pair into one tensor"):
            write()

    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(TypeError, match="would treat a pair as one tensor"):
        torch.relu(both)


def test_a_gradient_is_not_lost_in_silence():
    class Custom(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x * 2)

    both = pair(*halves(2))
    with pytest.raises(RuntimeError, match="where the student loses its gradient"):
        Custom.apply(both)
    assert (both.reference * 2).equal(Custom.apply(pair(both.reference, both.student.detach())).reference)
