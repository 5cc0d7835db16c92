"""What only a GPU can show; every other test of the kernels also runs there where there is one."""

import pytest
import torch
from cases import OPS, SEED, SITE, STEP, inputs

import selfnpo_kernels
from selfnpo_kernels import fused_adamw_, philox_normal

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def captured(function):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@pytest.mark.parametrize("op", [name for name in OPS if "on device" in name])
def test_a_captured_op_follows_what_lies_in_device_memory(op):
    t = inputs((3, 4, 16, 16), device="cuda")
    graph, results = captured(lambda: list(OPS[op](selfnpo_kernels, t)))
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


def test_cpu_and_gpu_draw_the_same_noise():
    ids = torch.arange(3)
    cpu, gpu = (philox_normal((3, 4, 33, 31), SEED, STEP, SITE, ids, device) for device in ("cpu", "cuda"))
    assert ((gpu.cpu() - cpu).abs() <= 5e-7 * (cpu.abs() / 2).clamp(min=1)).all()


@pytest.mark.parametrize("op", ["tweedie", "guided_step", "forward_jump", "cfg_combine"])
def test_one_launch(op):
    t = inputs((3, 4, 16, 16), device="cuda")
    OPS[op](selfnpo_kernels, t)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        OPS[op](selfnpo_kernels, t)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, [event.name for event in kernels]
