"""How reference and student share a step: what is possible, what is chosen, and that nothing else changes."""

import json
import sys
from dataclasses import replace
from functools import partial
from itertools import cycle, repeat

import pytest
import torch

from commands import call
from runs import settings, start
from selfnpo.config import TrainConfig
from selfnpo.errors import UserError
from selfnpo.models import Source
from selfnpo.training import tandem
from selfnpo.training.supported import capture_obstacle, check_supported, strategies

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("decay", [1.0, 0.999])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_shared_training_is_sequential_training(models, decay, checkpointing, scale):
    config = settings(
        models("stable_diffusion"), rank=2, reference_decay=decay, gradient_checkpointing=checkpointing,
        rollout_guidance_scale=scale, gradient_accumulation_steps=2,
    )  # fmt: skip
    one, other = start(config), start(replace(config, tandem="shared"))
    for _ in range(4):
        assert other.train_step()[0].item() == pytest.approx(one.train_step()[0].item(), rel=1e-4)
    expected, got = one.state.tensors(), other.state.tensors()
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=2e-4, msg=name)
    assert other.state.strategy == "shared"


@pytest.mark.parametrize(
    ("changes", "device", "expected"),
    [
        ({}, CPU, ["sequential"]),
        ({"rank": 4}, CPU, ["sequential", "shared"]),
        ({"rank": 4, "compile": True}, CPU, ["sequential"]),
        ({"rank": 4, "attention": "xformers"}, CPU, ["sequential"]),
        ({"rank": 4, "rollout_guidance_scale": 3.0}, CPU, ["sequential"]),
        ({"rank": 4}, CUDA, ["sequential", "streams", "shared"]),
        ({"capture": "off"}, CUDA, ["sequential"]),
        ({"rollout": "fresh", "rank": 4}, CUDA, ["sequential"]),
    ],
)
def test_what_can_run(changes, device, expected):
    assert strategies(TrainConfig(**changes), device) == expected


@pytest.fixture
def arms(monkeypatch, tmp_path):
    """Probes that say that they took so many milliseconds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def make(**milliseconds):
        monkeypatch.setattr(tandem, "_measure", lambda probes, device: ({name: milliseconds[name] for name in probes}, {}))
        return dict.fromkeys(milliseconds, lambda: ())

    return make


@pytest.mark.parametrize(
    ("shared", "expected"), [(90.0, "shared"), (96.9, "shared"), (97.1, "sequential"), (120.0, "sequential")]
)
def test_the_faster_one_is_taken_if_it_is_worth_it(arms, shared, expected):
    said = []
    assert tandem.fastest(arms(sequential=100.0, shared=shared), lambda: "here", CPU, said.append) == expected
    assert said == [f"reference and student: {expected} (sequential 100 ms, shared {shared:.3g} ms)"]


def test_a_choice_is_remembered_for_what_it_depends_on(arms, tmp_path):
    assert tandem.fastest(arms(sequential=2.0, shared=1.0), lambda: "here", CPU) == "shared"
    slower = arms(sequential=1.0, shared=2.0)
    assert tandem.fastest(slower, lambda: "here", CPU) == "shared"
    assert tandem.fastest(slower, lambda: "there", CPU) == "sequential"
    file = tmp_path / "selfnpo" / "tandem.json"
    assert json.loads(file.read_text())["here"] == {"strategy": "shared", "milliseconds": {"sequential": 2.0, "shared": 1.0}}
    file.write_text("{ not json")
    assert tandem.fastest(slower, lambda: "here", CPU) == "sequential"
    assert tandem.fastest({"sequential": None}, None, CPU) == "sequential"  # nothing to measure, and nothing asked


@pytest.mark.parametrize("failing", ["sequential", "streams", "shared"])
def test_a_strategy_that_cannot_be_captured_is_left_out(monkeypatch, tmp_path, failing):
    """Out of memory, say; with graphs that are pretended, of which `shared` is the fastest but for two turns."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(tandem, "on_stream", lambda stream, probe: probe())

    def capture(probe, pool, stream):
        if probe() == failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return lambda: turns[probe()]

    def seconds(name):
        yield from (9.0, 9.0) if name == "shared" else (0.1, 0.1)  # the first turn does not count, nor does one alone
        yield from repeat({"shared": 1.0, "streams": 2.0, "sequential": 3.0}[name])

    turns = {name: seconds(name) for name in ("sequential", "streams", "shared")}
    monkeypatch.setattr(tandem, "capture", capture)
    monkeypatch.setattr(tandem, "seconds_of", lambda graph, device: next(graph()))
    probes, said = {name: partial(str, name) for name in turns}, []
    chosen = tandem.fastest(probes, lambda: "here", CUDA, said.append)
    assert chosen == {"sequential": "sequential", "streams": "shared", "shared": "streams"}[failing]
    assert said[0] == f"reference and student: {failing} cannot run here: CUDA out of memory. Tried to allocate"


def test_measuring_leaves_no_trace_and_a_resumed_run_keeps_its_strategy(models, tmp_path, capsys, monkeypatch):
    seconds = cycle([1.0, 2.0])  # sequential, shared
    monkeypatch.setattr(tandem, "seconds_of", lambda probe, device: (probe(), next(seconds))[1])
    config = settings(models("class_conditional"), rank=2, tandem="auto")
    first = start(config, tmp_path / "run")
    before = {name: tensor.clone() for name, tensor in first.state.tensors().items() if not name.startswith("rollout")}
    first.step.prepare()
    assert all(tensor.equal(before[name]) for name, tensor in first.state.tensors().items() if name in before)
    assert "reference and student: sequential (sequential 1e+03 ms, shared 2e+03 ms)" in capsys.readouterr().out
    first.state.strategy = "shared"
    first._checkpoint(final=True)
    first.writer.wait()
    resumed = start(replace(config, resume_from_checkpoint="latest"), tmp_path / "run")
    resumed.step.prepare()
    assert resumed.step.tandem.strategy == "shared"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"rollout": "data"}, "rollout is data, whose batches vary in size"),
        ({"low_vram": True}, "low_vram keeps weights or prompts on the host"),
        ({"use_8bit_adam": True}, "use_8bit_adam counts its steps on the host"),
        ({"mixed_precision": "fp16"}, "mixed_precision is fp16"),
    ],
)
def test_settings_that_cannot_be_captured(changes, reason):
    config = TrainConfig(capture="on", **changes)
    assert capture_obstacle(config, CUDA).startswith(reason)
    if reason:
        with pytest.raises(UserError, match=f"capture is on, but {reason}"):
            check_supported(config, Source(config), CUDA)
    else:
        check_supported(config, Source(config), CUDA)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--capture", "on"], "capture is on, but CUDA graphs need an NVIDIA GPU, and there is none; leave --capture out"),
        (["--tandem", "streams"], "tandem is streams, which needs a step captured in a CUDA graph (CUDA graphs need"),
        (["--tandem", "shared"], "tandem is shared, which needs a LoRA (--rank), rollout pool"),
        (["--compile", "--low_vram"], "compile and low_vram are both on"),
        (["--compile", "--attention", "xformers"], "compile is on with attention xformers"),
        (["--attention", "xformers"], "attention is xformers, which cannot run here: "),
        (["--use_8bit_adam"], "use_8bit_adam needs the package bitsandbytes; run pip install 'selfnpo[bitsandbytes]'"),
        (["--report_to", "tensorboard"], "which is not installed; run pip install 'selfnpo[tensorboard]'"),
        (["--report_to", "wandb"], "which is not installed; run pip install 'selfnpo[wandb]'"),
    ],
)
def test_impossible_settings_are_said_before_weights_load(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setattr("selfnpo.inputs.data.load_base", None)
    for package in ("xformers", "bitsandbytes", "tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    assert call("train", "--output_dir", tmp_path / "run", *flags) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_too_old_to_compile_for_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GTX 1080")
    with pytest.raises(UserError, match="which needs Triton on a GPU of sm_70 or later: GTX 1080 is older than sm_70; inst"):
        check_supported(TrainConfig(compile=True), Source(TrainConfig()), CUDA)


def test_a_missing_compiler_is_said(monkeypatch):
    def nothing():
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr("selfnpo.training.supported.get_cpp_compiler", nothing)
    with pytest.raises(UserError, match=r"compile is on, which needs a C\+\+ compiler: No working"):
        check_supported(TrainConfig(compile=True), Source(TrainConfig()), CPU)
