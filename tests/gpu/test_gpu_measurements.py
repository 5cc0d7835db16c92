"""What is measured on a GPU: attention backends, strategies for reference and student, peak, energy, utilisation."""

import re

import pytest
import torch

from selfnpo.device import Meter, default_device, matmul_peak
from selfnpo.training.attention import NAMES

pytestmark = pytest.mark.gpu

STEPS = 8  # of which the last three are replayed


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_attention_is_chosen_by_measurement(trained, capsys, precision):
    trained(STEPS, "stable_diffusion", attention="auto", capture="on", rank=2, mixed_precision=precision)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("attention")]
    pattern = r"attention (2x2x(?:64x8|16x16), \d+) keys: ([a-z ]+) (\d+\.\d{3}) ms.*, \d layers?"
    found = [re.fullmatch(pattern, line) for line in lines]
    assert all(found), lines
    assert sorted(match[1] for match in found) == ["2x2x16x16, 16", "2x2x16x16, 77", "2x2x64x8, 64", "2x2x64x8, 77"]
    assert all(match[2] in NAMES.values() and float(match[3]) > 0 for match in found)


@pytest.mark.parametrize(("rank", "strategies"), [(0, "sequential|streams"), (2, "sequential|streams|shared")])
def test_the_strategy_is_chosen_by_measurement(trained, capsys, monkeypatch, tmp_path, rank, strategies):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where choices are remembered
    trainer, _ = trained(STEPS, "stable_diffusion", tandem="auto", capture="on", rank=rank)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("reference and student"))
    chosen = re.match(rf"reference and student: ({strategies}) \(", line)
    assert chosen[1] == trainer.state.strategy == trainer.step.tandem.strategy
    milliseconds = dict(re.findall(r"(\w+) ([\d.]+) ms", line))
    assert set(milliseconds) == set(strategies.split("|"))
    assert all(float(value) > 0 for value in milliseconds.values())


def test_peak_energy_and_utilisation():
    device = default_device()
    meter = Meter(device)
    peaks = {dtype: matmul_peak(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    for _ in range(100):  # longer than the driver's sampling
        matmul_peak(device, torch.bfloat16)
        meter.sample()
    report = meter.report()
    assert 1e12 < peaks[torch.float32] < 1e16
    assert peaks[torch.float32] < peaks[torch.bfloat16] < 1e16
    assert 0 < report["energy_wh"] < 10
    assert 0.1 < report["gpu_utilisation"] <= 1
