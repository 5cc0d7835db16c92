"""FLOPs against counts by hand and against those of published models; the driver's answers; the closing lines of a run."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import published
from runs import settings, start
from selfnpo.budget.cost import EFFICIENCY, Flops, cost_lines, cost_of_compute, count_flops, predicted, step_flops
from selfnpo.budget.meta import call_on_meta
from selfnpo.config import TrainConfig
from selfnpo.device import Meter, matmul_peak
from selfnpo.export.run_cost import compute_cost
from selfnpo.models import Source

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

# The embedded model, a transformer with one token of 96 channels: 2 FLOPs per weight.
BLOCK = 2 * (256 * 96 + 96 * 96 + 96 * 6 * 96 + 4 * 96 * 96 + 2 * 4 * 96 * 96)  # embedding of t, modulation, attention, MLP
ATTENTION = 2 * 2 * 96  # Q K^T and its product with V
PATCH = 2 * 8 * 8 * 96
LAST = 2 * (256 * 96 + 96 * 96 + 96 * 2 * 96 + 96 * 64)
DEMO = PATCH + 2 * (BLOCK + ATTENTION) + LAST
# A full backward pass costs twice the forward pass, but the picture and the encoded times need no gradient.
DEMO_TRAINING = 3 * DEMO - PATCH - 3 * 2 * 256 * 96


def count_of(**settings) -> Flops:
    config = TrainConfig(**settings)
    return count_flops(config, Source(config))


@pytest.fixture
def unet_folder(tmp_path) -> Path:
    """A small Stable Diffusion: 8 x 8 latents, 16 and 32 channels."""
    unet = published.STABLE_DIFFUSION_1_5["unet/config.json"] | {
        "sample_size": 8, "block_out_channels": [16, 32], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "layers_per_block": 1, "norm_num_groups": 8,
        "attention_head_dim": 2, "cross_attention_dim": 24,
    }  # fmt: skip
    return published.write(published.STABLE_DIFFUSION_1_5 | {"unet/config.json": unet}, tmp_path / "small")


def test_the_embedded_model_counted_by_hand():
    assert count_of() == Flops(DEMO, DEMO_TRAINING)


def test_checkpointed_blocks_are_counted_twice():
    assert count_of(gradient_checkpointing=True) == Flops(DEMO, DEMO_TRAINING + 2 * (BLOCK + ATTENTION))


def test_frozen_weights_need_no_gradients():
    rank_4, rank_8 = count_of(rank=4), count_of(rank=8)
    assert rank_4.forward == rank_8.forward == DEMO  # of the plain denoiser
    assert DEMO < rank_4.training < 2 * DEMO < DEMO_TRAINING
    # Two factors at each of eight projections, three times; the first block's Q, K and V have inputs without gradients.
    assert rank_8.training - rank_4.training == 4 * (8 * 2 * 3 - 3) * 2 * 96


def test_a_unet_with_attention_counted_layer_by_layer(unet_folder):
    config = TrainConfig(pretrained_model_name_or_path=str(unet_folder))
    source = Source(config)
    model, layers = source.empty_denoiser(), []
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda layer, _, out: layers.append(2 * layer.weight[0].numel() * out.numel()))
    with torch.no_grad():
        call_on_meta(source, model, (4, 8, 8), 1, config)
    # (how often, pixels, channels): at 8 x 8 one on the way down and two on the way up; at 4 x 4 the one in the middle
    attention = sum(times * 4 * pixels * (pixels + 77) * width for times, pixels, width in ((3, 64, 16), (1, 16, 32)))
    flops = count_flops(config, source)
    assert flops.forward == sum(layers) + attention
    assert 2.9 < flops.training / flops.forward < 3


@pytest.mark.parametrize(
    ("settings", "training"), [({}, 2.407), ({"gradient_checkpointing": True}, 3.002), ({"rank": 8}, 1.718)]
)
def test_stable_diffusion_1_5(tmp_path, settings, training):
    folder = published.write(published.STABLE_DIFFUSION_1_5, tmp_path)
    flops = count_of(pretrained_model_name_or_path=str(folder), **settings)
    assert flops.forward == pytest.approx(0.803e12, rel=1e-3)
    assert flops.training == pytest.approx(training * 1e12, rel=1e-3)


@pytest.mark.parametrize(("scale", "branches"), [(0.0, 1), (1.0, 1), (-1.0, 2), (0.5, 2), (4.0, 2)])
def test_flops_of_a_step(scale, branches):
    config = TrainConfig(rollout_guidance_scale=scale, train_batch_size=5, gradient_accumulation_steps=4)
    assert step_flops(config, Flops(forward=10, training=30), 6.5) == 20 * (30 + 6.5 * branches * 10)


def test_the_released_recipe():
    """240.9 TFLOP a step: 12 forward passes of the reference, forward and backward pass of the student, 20 samples."""
    config = TrainConfig(train_batch_size=20)
    assert step_flops(config, Flops(803_273_441_280, 2_406_773_063_680), 12) == pytest.approx(240.9e12, rel=1e-3)


def test_the_peak_is_the_fastest_product(monkeypatch):
    durations = iter([9.0, 0.5, 0.5, 0.25, *[0.5] * 7])  # the first is the warm-up
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += next(durations)
        return now

    before = torch.get_rng_state()
    with monkeypatch.context() as patched:
        patched.setattr(time, "perf_counter", clock)
        assert matmul_peak(CPU, torch.float32) == 2 * 1024**3 / 0.25
    assert next(durations, None) is None
    assert torch.equal(torch.get_rng_state(), before)


class FakeNvml:
    """NVML with one GPU, whose functions can fail."""

    class NVMLError(Exception):
        pass

    def __init__(self):
        self.failing: set[str] = set()
        self.energy: Iterator[int] = iter([5_000_000, 5_000_000 + 2 * 3_600_000])  # mJ
        self.busy: Iterator[int] = iter([90, 100, 98])

    def _answer(self, name: str, answer):
        if name in self.failing:
            raise self.NVMLError(name)
        return answer

    def nvmlInit(self):
        return self._answer("nvmlInit", None)

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-0a1b"
        return self._answer("nvmlDeviceGetHandleByUUID", "handle")

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        assert handle == "handle"
        return self._answer("nvmlDeviceGetTotalEnergyConsumption", next(self.energy))

    def nvmlDeviceGetUtilizationRates(self, handle):
        assert handle == "handle"
        return self._answer("nvmlDeviceGetUtilizationRates", SimpleNamespace(gpu=next(self.busy), memory=1))


@pytest.fixture
def nvml(monkeypatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0a1b"))
    return fake


def test_energy_and_utilisation(nvml):
    gpu = Meter(CUDA)
    for _ in range(3):
        gpu.sample()
    assert gpu.report() == {"energy_wh": pytest.approx(2.0), "gpu_utilisation": pytest.approx(0.96)}


def test_a_run_too_short_to_be_sampled(nvml):
    assert Meter(CUDA).report() == {"energy_wh": pytest.approx(2.0), "gpu_utilisation": None}


@pytest.mark.parametrize(
    ("failing", "energy", "busy"),
    [
        ("nvmlInit", None, None),
        ("nvmlDeviceGetHandleByUUID", None, None),
        ("nvmlDeviceGetTotalEnergyConsumption", None, 0.9),
        ("nvmlDeviceGetUtilizationRates", 2.0, None),
    ],
)
def test_a_driver_that_does_not_answer(nvml, failing, energy, busy):
    nvml.failing.add(failing)
    gpu = Meter(CUDA)
    gpu.sample()
    assert gpu.report() == {"energy_wh": energy, "gpu_utilisation": busy}


def test_a_driver_that_is_lost_on_the_way(nvml):
    gpu = Meter(CUDA)
    gpu.sample()
    nvml.failing |= {"nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetUtilizationRates"}
    gpu.sample()
    assert gpu.report() == {"energy_wh": None, "gpu_utilisation": 0.9}


def test_a_cpu_has_no_meter(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # which cannot be imported
    cpu = Meter(CPU)
    cpu.sample()
    assert cpu.report() == {"energy_wh": None, "gpu_utilisation": None}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_nvml_itself_without_a_driver():
    gpu = Meter(CUDA)
    gpu.sample()
    assert gpu.report() == {"energy_wh": None, "gpu_utilisation": None}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nvml_itself():
    gpu = Meter(CUDA)
    peak = matmul_peak(CUDA, torch.bfloat16)
    gpu.sample()
    report = gpu.report()
    assert 1e12 < peak < 1e16
    assert report["energy_wh"] is None or 0 <= report["energy_wh"] < 10
    assert report["gpu_utilisation"] is None or 0 <= report["gpu_utilisation"] <= 1


def test_cost_of_compute():
    assert cost_of_compute(CUDA, seconds=1800, flops_done=1.8e17, peak=4e14) == {
        "gpu_hours": 0.5, "tflops": 100, "fraction_of_matmul_peak": 0.25, "matmul_peak_tflops": 400
    }  # fmt: skip
    assert cost_of_compute(CPU, seconds=1800, flops_done=1.8e17) == {"cpu_hours": 0.5, "tflops": 100}


@pytest.mark.parametrize("fills_a_gpu", [False, True])
def test_a_cpu_has_no_peak_and_predicts_only_for_models_that_fill_a_gpu(models, tmp_path, monkeypatch, fills_a_gpu):
    trainer = start(settings(models("unconditional"), max_train_steps=1), tmp_path)
    trainer.run()
    flops = Flops(forward=10**12, training=10**12) if fills_a_gpu else Flops(10**6, 10**6)
    cost = compute_cost(trainer.state, trainer.meter, flops)
    assert cost["tflops"] > 0
    assert ("predicted_gpu_hours" in cost) == fills_a_gpu
    assert not [name for name in cost if "peak" in name]


def test_predictions_assume_the_record():
    assert EFFICIENCY == round(307 / 990, 2) == 0.31
    hours = predicted(0.31 * 990e12 * 3600)
    assert hours == {"A100": pytest.approx(990 / 312), "H100": pytest.approx(1), "H200": pytest.approx(1)}


def described(device: torch.device, seconds: float, tflops: float, peak_tflops: float | None, **others: object) -> str:
    peak = None if peak_tflops is None else peak_tflops * 1e12
    cost = cost_of_compute(device, seconds, tflops * 1e12 * seconds, peak)
    cost |= {"energy_wh": None, "gpu_utilisation": None} | others
    return cost_lines(json.loads(json.dumps(cost)))


def test_the_closing_line_on_a_gpu():
    line = described(CUDA, 0.031 * 3600, 410, 788, samples_per_second=12.345, energy_wh=21.02, gpu_utilisation=0.9712)
    assert line == (
        "0.031 GPU-hours, 12.3 samples/s, 410 TFLOP/s (52 % of the matmul peak measured in this run), 21 Wh, GPU busy 97 %"
    )
    silent = described(CUDA, 7.2e5, 410, 410, samples_per_second=0.012345)
    assert silent == "200 GPU-hours, 0.0123 samples/s, 410 TFLOP/s (100 % of the matmul peak measured in this run)"


def test_the_closing_lines_without_a_gpu():
    hours = {"A100": 0.0317, "H100": 0.01, "H200": 0.0001}
    lines = described(CPU, 72, 0.2, None, samples_per_second=8996.0, predicted_gpu_hours=hours)
    assert lines.splitlines() == [
        "72 CPU-seconds, 9000 samples/s, 200 GFLOP/s",
        "predicted at 31 % of peak: 0.0317 GPU-hours on an A100, 36 GPU-seconds on an H100, 0.36 GPU-seconds on an H200",
    ]


def test_small_runs_show_no_zeros():
    line = described(CUDA, 0.5, 12.34e-6, 0.1, samples_per_second=123456.0, energy_wh=0.00612, gpu_utilisation=0.004)
    assert line == (
        "0.5 GPU-seconds, 123000 samples/s, 12.3 MFLOP/s (0.012 % of the matmul peak measured in this run), 6.12 mWh, "
        "GPU busy 0.4 %"
    )


@pytest.mark.parametrize(("watt_hours", "text"), [(0, "0 Wh"), (999, "999 Wh"), (1000, "1 kWh"), (2e-5, "0.02 mWh")])
def test_prefixes(watt_hours, text):
    line = described(CUDA, 60, 1, 1, samples_per_second=1, energy_wh=watt_hours)
    assert line.endswith(f", {text}")
