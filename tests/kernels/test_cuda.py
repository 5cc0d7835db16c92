"""What only a GPU can show, and in short what every other test of the kernels shows there too."""

import pytest
import torch

import selfnpo_kernels
from cases import DTYPES, LAYOUTS, OPERANDS, OPS, SEED, SITE, STEP, adamw_lists, agree, check, inputs
from selfnpo_kernels import backend, dispatch, fused_adamw_, join_weights, philox_normal

pytestmark = pytest.mark.gpu


def test_the_device_chooses():
    here = torch.zeros(1, device="cuda")
    assert dispatch.backend_for("tweedie", here) == "triton"
    assert dispatch.backend_for("fused_adamw_", here, cuda="cpp") == "cpp"
    assert dispatch.backend_for("tweedie", here.double()) == "reference"


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_equals_the_float64_reference(op, dtype, layout):
    check(op, inputs((3, 4, 33, 31), dtype, "cuda", layout))


def captured(function):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@pytest.mark.parametrize("op", OPS)
def test_a_captured_op_follows_what_lies_in_device_memory(op):
    t = inputs((3, 4, 16, 16), device="cuda")
    graph, results = captured(lambda: list(OPS[op](selfnpo_kernels, t)))
    for operand in OPERANDS:
        getattr(t, operand).mul_(-0.5)
    t.scale.add_(1), t.seed.add_(1), t.step.add_(1)
    graph.replay()
    for replayed, eager in zip(results, OPS[op](selfnpo_kernels, t), strict=True):
        assert replayed.equal(eager)


def test_a_captured_optimizer_counts_its_steps():
    def fresh():
        return [[torch.full((9000,), value, device="cuda")] for value in (1.0, 0.5, 0.0, 0.0)]

    step, lr = torch.tensor(0, device="cuda"), torch.tensor(1e-2, device="cuda")
    lists, twin = fresh(), fresh()

    def update(lists):
        step.add_(1)
        fused_adamw_(*lists, step=step, lr=lr)

    graph, _ = captured(lambda: update(lists))
    for copy, original in zip(lists, fresh(), strict=True):
        copy[0].copy_(original[0])
    step.zero_()
    for _ in range(3):
        graph.replay()
    step.zero_()
    for _ in range(3):
        update(twin)
    assert lists[0][0].equal(twin[0][0])
    assert not lists[0][0].equal(fresh()[0][0])


def stepped(name, dtype, split):
    """Weights, averages and moments in float32 after one step on a backend."""
    lists = adamw_lists(dtype, split, device="cuda")
    step, lr, scale = (torch.tensor(value, device="cuda") for value in (7, 1e-2, 0.5))
    with backend(name):
        fused_adamw_(**lists, step=step, lr=lr, grad_scale=scale, weight_decay=0.1, ema_decay=0.9)
    weights = [*lists["params"], *lists["emas"]]
    if split:
        weights = map(join_weights, weights, [*lists["lows"], *lists["ema_lows"]])
    return [*weights, *lists["exp_avgs"], *lists["exp_avg_sqs"]]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_optimizer_on_many_tensors(dtype, split):
    for ours, expected in zip(stepped("cpp", dtype, split), stepped("reference", dtype, split), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_cpu_and_gpu_draw_the_same_noise():
    ids = torch.arange(3)
    cpu, gpu = (philox_normal((3, 4, 33, 31), SEED, STEP, SITE, ids, device) for device in ("cpu", "cuda"))
    assert agree(gpu.cpu(), cpu)


@pytest.mark.parametrize("op", ["tweedie", "guided_step", "forward_jump", "cfg_combine"])
def test_one_launch(op, monkeypatch):
    monkeypatch.undo()  # poisoned outputs (conftest.py) are launches too
    t = inputs((3, 4, 16, 16), device="cuda")
    OPS[op](selfnpo_kernels, t)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        OPS[op](selfnpo_kernels, t)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, [event.name for event in kernels]
