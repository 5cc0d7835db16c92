"""A layer runs with the backend of attention that was measured to be the fastest, and that changes nothing else."""

import copy
from functools import partial
from unittest.mock import patch

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from pretended_device import pretended_device
from selfnpo.config import TrainConfig
from selfnpo.models import ModelOptions, load_pretrained
from selfnpo.training import attention
from selfnpo.training.attention import Choice, Chosen, choice_lines, choose_attention, spare_single_keys
from selfnpo.training.trainer import Trainer

CUDNN, FLASH, MATH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
choose = partial(choose_attention, backends=(FLASH, MATH))  # what a CPU has
FLASH_OP, MATH_OP = "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_attention_math"
LAYERS = {"stable_diffusion": 8, "unconditional": 4, "cogvideox": 2, "cogvideox_rotary": 2, "class_conditional": 2}
TWO_LAYERS = {((2, 2, 16, 16), 16): 2}


class Model:
    """A tiny model and one forward pass of it, of two samples."""

    def __init__(self, folder):
        self.base = load_pretrained(ModelOptions(str(folder)))
        self.denoiser = self.base.denoiser

    def __call__(self, samples=2):
        noise = torch.randn(samples, *self.base.sample_shape, generator=torch.Generator().manual_seed(1))
        time, condition = torch.full((samples,), 500), torch.zeros(samples, dtype=torch.long)
        return self.base.predict(self.denoiser, noise, time, condition)

    def processors(self):
        return [module.processor for module in self.denoiser.modules() if hasattr(module, "set_processor")]


@pytest.fixture
def load(models):
    return lambda family="class_conditional": Model(models(family))


@pytest.fixture
def timed(monkeypatch):
    """Pretends how long a call takes: milliseconds by backend, or a function of the inputs' shape and the backend."""

    def pretend(times):
        def milliseconds(inputs, options, backend):
            return times(inputs[0].shape, backend) if callable(times) else times.get(backend, 1.0)

        monkeypatch.setattr(attention, "milliseconds", milliseconds)

    return pretend


def calls(run):
    """How often which backend runs."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    counts = {event.key: event.count for event in profiled.key_averages()}
    return {"flash": counts.get(FLASH_OP, 0), "math": counts.get(MATH_OP, 0)}


@pytest.mark.parametrize(("winner", "against"), [(MATH, FLASH), (FLASH, MATH)])
@pytest.mark.parametrize("family", LAYERS)
def test_the_winner_runs_and_the_output_stays(load, timed, family, winner, against):
    model, layers = load(family), LAYERS[family]
    expected, kinds = model(), [type(processor).__name__ for processor in model.processors()]
    timed({winner: 0.5})
    choices = choose(model.denoiser, model)
    name, other = attention.NAMES[winner], attention.NAMES[against]
    assert sum(choice.modules for choice in choices) == layers
    assert {choice.backend for choice in choices} == {name}
    assert all(choice.milliseconds == {"own choice": 1.0, name: 0.5, other: 1.0} for choice in choices)
    assert [type(processor).__name__ for processor in model.processors()] == kinds  # diffusers tells them by it
    torch.testing.assert_close(model(), expected, rtol=1e-5, atol=1e-5)
    with sdpa_kernel(against):
        assert calls(model) == {name: layers, other: 0}
    assert calls(copy_of(model)) == {name: layers, other: 0}


def copy_of(model):
    other = copy.copy(model)
    other.denoiser = copy.deepcopy(model.denoiser)
    return other


def test_every_shape_is_measured_once(load, timed):
    timed(lambda shape, backend: 0.5 if backend == MATH and shape[2] == 64 else 1.0)
    model, elsewhere = load("stable_diffusion"), torch.ones(1, 1, 5, 8)
    choices = choose(
        model.denoiser, lambda: (model(), functional.scaled_dot_product_attention(elsewhere, elsewhere, elsewhere))
    )
    found = {choice.shape: (choice.backend, choice.modules) for choice in choices}
    assert found == {
        ((2, 2, 64, 8), 64): ("math", 3),
        ((2, 2, 64, 8), 77): ("math", 3),
        ((2, 2, 16, 16), 16): ("own choice", 1),
        ((2, 2, 16, 16), 77): ("own choice", 1),
    }
    assert sum(isinstance(processor, Chosen) for processor in model.processors()) == 6


def test_a_model_is_left_as_it_is_unless_something_is_clearly_faster(load, timed):
    model = load()
    before = model.processors()
    for faster, is_taken in ((0.98, False), (0.97, True), (0.98, False)):  # the last of them takes the choice back
        timed({MATH: faster})
        (choice,) = choose(model.denoiser, model)
        assert choice.backend == ("math" if is_taken else "own choice")
        assert all(isinstance(processor, Chosen) == is_taken for processor in model.processors())
    assert all(now is old for now, old in zip(model.processors(), before, strict=True))
    timed({FLASH: 0.5})
    for _ in range(2):
        choose(model.denoiser, model)
        assert [processor.processor for processor in model.processors()] == before


def test_backends_that_cannot_run_are_left_out(load):
    model = load()
    before = model.processors()
    with torch.no_grad():
        (choice,) = choose_attention(model.denoiser, model, [CUDNN, MATH])
    assert choice.milliseconds.keys() == {"own choice", "math"}
    model = load()
    (choice,) = choose_attention(model.denoiser, model, [CUDNN])
    assert choice.backend == "own choice"
    assert not any(isinstance(processor, Chosen) for processor in model.processors())
    assert [type(processor) for processor in model.processors()] == [type(processor) for processor in before]


def test_what_fails_for_pytorch_itself_is_an_error(load, monkeypatch):
    def fail(inputs, options, backend):
        raise RuntimeError("broken")

    monkeypatch.setattr(attention, "milliseconds", fail)
    model = load()
    with pytest.raises(RuntimeError, match="broken"):
        choose(model.denoiser, model)


def masked(model, mask):
    sample, time = torch.zeros(2, 4, 8, 8), torch.full((2,), 500)
    return model.denoiser(sample, time, torch.ones(2, 77, 32), encoder_attention_mask=mask).sample


def test_layers_with_a_mask_are_left_alone(load, timed):
    model, mask = load("stable_diffusion"), torch.ones(2, 77)
    timed({MATH: 0.5})
    choices = choose(model.denoiser, lambda: masked(model, mask))
    assert {choice.shape[1] for choice in choices} == {64, 16}
    names = [
        name for name, module in model.denoiser.named_modules() if isinstance(getattr(module, "processor", None), Chosen)
    ]
    assert len(names) == 4
    assert all(name.endswith("attn1") for name in names)


def test_a_call_that_the_chosen_backend_cannot_run_goes_to_another(load, timed):
    model, mask = load("stable_diffusion"), torch.ones(2, 77, requires_grad=True)
    timed({FLASH: 0.5})
    expected = masked(model, mask)
    choose(model.denoiser, model)
    assert all(processor.backend == FLASH for processor in model.processors())
    torch.testing.assert_close(masked(model, mask), expected)
    assert calls(lambda: masked(model, mask)) == {"flash": 4, "math": 4}


def test_a_layer_with_several_winners_keeps_pytorchs_choice(load, timed):
    model = load()
    timed(lambda shape, backend: 0.5 if backend == (MATH if shape[0] == 2 else FLASH) else 1.0)
    choices = choose(model.denoiser, lambda: (model(2), model(1)))
    assert {choice.shape[0][0]: choice.backend for choice in choices} == {2: "math", 1: "flash"}
    assert not any(isinstance(processor, Chosen) for processor in model.processors())


def test_a_processor_with_weights_stays_in_the_state_dict(load, timed):
    class WithWeights(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)

    model = load()
    attn = model.denoiser.transformer_blocks[0].attn1
    attn.set_processor(WithWeights())
    before = model.denoiser.state_dict().keys()
    timed({MATH: 0.5})
    (choice,) = choose(model.denoiser, model)
    assert choice.modules == 1
    assert model.denoiser.state_dict().keys() == before
    assert calls(model) == {"flash": 1, "math": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_timed_is_what_the_model_does(load, monkeypatch, dtype):
    """In the same layout and precision, with gradients, arms in turn, warm-ups apart, without the run's random numbers."""
    model, seen = load("cogvideox"), []
    for block in model.denoiser.transformer_blocks:  # as autocast does it on a GPU; the call casts it
        block.attn1.norm_q.register_forward_hook(lambda module, args, output: output.float())

    def milliseconds(inputs, options, backend):
        seen.append((inputs, options, backend))
        turn = (len(seen) - 1) // 3
        return 100.0 if turn < attention.WARM_UPS else float(turn)

    monkeypatch.setattr(attention, "milliseconds", milliseconds)
    state = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        (choice,) = choose(model.denoiser, model)
    assert state.equal(torch.get_rng_state())
    rounds = range(attention.WARM_UPS, attention.WARM_UPS + attention.ROUNDS)
    assert choice.milliseconds == dict.fromkeys(("own choice", "flash", "math"), sum(rounds) / len(rounds))
    assert [backend for *_, backend in seen] == [None, FLASH, MATH] * (attention.WARM_UPS + attention.ROUNDS)
    tokens = choice.shape[1]
    apart, side_by_side = (tokens * 32, tokens * 16, 16, 1), (tokens * 32, 16, 32, 1)
    for inputs, options, _ in seen:
        assert options == {"dropout_p": 0.0, "is_causal": False}
        assert [tensor.stride() for tensor in inputs] == [apart, apart, side_by_side]  # heads; norms rewrite query and key
        for tensor in inputs:
            assert tensor.shape == (2, 2, tokens, 16)
            assert tensor.dtype == dtype
            assert tensor.requires_grad
            assert 0.9 < tensor.float().std() < 1.1


def test_the_backward_pass_is_timed_too():
    inputs = [torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3)]
    for backend in (None, FLASH):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            assert attention.milliseconds(inputs, {}, backend) > 0
        assert f"{FLASH_OP}_backward" in {event.key for event in profiled.key_averages()}
    assert calls(lambda: attention.milliseconds(inputs, {}, MATH)) == {"flash": 0, "math": 1}


def test_a_gpu_is_timed_by_its_own_events():
    """Pretended: the launches wait for the GPU to end its sleep, and the host for the second event."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            return 1.5

    with (
        pretended_device() as device,
        patch("torch.cuda.Event", Event),
        patch("torch.cuda._sleep", lambda cycles: log.append("sleep")),
    ):
        inputs = [torch.ones(1, 2, 8, 16).to(device).requires_grad_() for _ in range(3)]
        assert attention.milliseconds(inputs, {}, None) == 1.5
    assert log == ["sleep", "record", "record", "synchronize"]


@pytest.mark.parametrize(
    ("family", "part"), [("cogvideox_rotary", "transformer_blocks.0"), ("stable_diffusion", "mid_block")]
)
def test_parts_compile_without_a_graph_break(load, timed, family, part):
    model = load(family)
    expected = model()
    timed({MATH: 0.5})
    choose(model.denoiser, model)
    counter = CompileCounterWithBackend("eager")
    model.denoiser.get_submodule(part).compile(fullgraph=True, dynamic=False, backend=counter)
    torch.testing.assert_close(model(), expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    assert calls(model) == {"flash": 0, "math": LAYERS[family]}


def test_compiled_blocks_share_a_graph_where_they_share_a_choice(load, timed):
    model = load()
    blocks = model.denoiser.transformer_blocks
    given = {"timestep": torch.tensor([1, 2]), "class_labels": torch.tensor([3, 4])}
    states = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    expected = [block(states, **given) for block in blocks]
    counter = CompileCounterWithBackend("aot_eager")
    for number, winner in enumerate((MATH, FLASH), start=1):
        timed({winner: 0.5})
        choose(model.denoiser, model)
        for block, plain in zip(blocks, expected, strict=True):
            compiled = torch.compile(block, fullgraph=True, dynamic=False, backend=counter)
            torch.testing.assert_close(compiled(states, **given), plain, rtol=1e-5, atol=1e-5)
            assert calls(partial(compiled, states, **given))["flash"] == (winner == FLASH)
        assert counter.frame_count == number


def test_a_model_that_is_compiled_already(load, timed):
    model = load()
    expected = model()
    model.denoiser.compile(backend="eager", fullgraph=True, dynamic=False)
    model()
    timed({MATH: 0.5})
    choices = choose(model.denoiser, model)
    assert {choice.shape: choice.modules for choice in choices} == TWO_LAYERS
    torch.testing.assert_close(model(), expected, rtol=1e-5, atol=1e-5)
    assert calls(model) == {"flash": 0, "math": 2}


def test_gradients_are_those_of_pytorchs_choice(load, timed):
    model, gradients = load(), []
    model.denoiser.requires_grad_(True)
    for winner in (None, MATH):
        timed({winner: 0.5})
        choose(model.denoiser, model)
        gradients.append(torch.autograd.grad(model().square().mean(), [*model.denoiser.parameters()], allow_unused=True))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_on_a_cpu_a_single_key_costs_no_kernel_and_has_no_gradient(attention):
    """The demo's models see one token each."""
    trainer = Trainer(TrainConfig(pool_size=1, train_batch_size=4, attention=attention), load_pretrained())
    trainer.train_step()
    spared = attention == "auto"
    assert calls(trainer.train_step) == ({"flash": 0, "math": 4} if spared else {"flash": 4, "math": 0})
    moments = trainer.state.optimizer.tensors()
    of_queries = [moment for name, moment in moments.items() if "to_q" in name and name.endswith("exp_avg")]
    assert len(of_queries) == 4
    assert all((moment == 0).all() == spared for moment in of_queries)


def test_on_a_cpu_several_keys_stay_with_pytorchs_choice(load):
    model = load("stable_diffusion")
    before = model.processors()
    spare_single_keys(model.denoiser, model)
    assert model.processors() == before


def test_lines_for_the_output():
    choices = [
        Choice(((4, 8, 4096, 40), 4096), "cudnn", {"own choice": 1.38, "flash": 1.4, "cudnn": 1.21}, 16),
        Choice(((4, 8, 64, 160), 77), "own choice", {"own choice": 0.0312}, 1),
    ]
    assert choice_lines(choices).splitlines() == [
        "attention 4x8x4096x40, 4096 keys: cudnn 1.210 ms (own choice 1.380, flash 1.400), 16 layers",
        "attention 4x8x64x160, 77 keys: own choice 0.031 ms, 1 layer",
    ]
