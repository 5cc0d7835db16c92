"""What a run leaves: plain diffusers and ComfyUI load it, pictures and figures tell of it."""

import json
import re
from dataclasses import replace
from functools import partialmethod

import pytest
import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file

from runs import FAMILIES, RANKS, settings, start
from selfnpo.export.negative import save_negative
from selfnpo.models import load_negative, load_pretrained
from selfnpo.training.validation import save_grid

LORA_FAMILIES = ["stable_diffusion", "stable_diffusion_xl", "cogvideox"]  # of which diffusers loads LoRAs


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_loads_in_plain_diffusers_and_changes_its_output(models, tmp_path, monkeypatch, caplog, family, rank):
    trainer = start(settings(models(family), rank=rank, learning_rate=1e-2), tmp_path)
    trainer.run()
    state = trainer.state
    folder = save_negative(state, "completed")

    pipeline = DiffusionPipeline.from_pretrained(models(family))
    component = state.base.family.component
    if rank and family.removesuffix("_rotary") in LORA_FAMILIES:
        pipeline.load_lora_weights(folder)
    else:
        setattr(pipeline, component, state.base.family.denoiser_class.from_pretrained(folder))
    sample, time = torch.randn(2, *state.base.sample_shape), torch.full((2,), 300.0)
    condition = torch.tensor([0, state.base.null_condition])
    with torch.no_grad():
        theirs, ours, base = (
            state.base.predict(model, sample, time, condition)
            for model in (getattr(pipeline, component), state.model, state.base.denoiser)
        )
    change = (ours - base).abs().max()
    assert change > 1e-3 * base.abs().max()
    assert (theirs - ours).abs().max() < 1e-3 * change
    again = load_negative(folder, load_pretrained(state.base.source.options))
    with torch.no_grad():
        assert (state.base.predict(again, sample, time, condition) - ours).abs().max() < 1e-3 * change
    card = (folder / "README.md").read_text()
    for text in ("library_name: diffusers", "alpha = 1, beta = 1", "samples per second", f"rank: {rank}"):
        assert text in card
    if family.startswith("stable_diffusion"):
        monkeypatch.setattr(type(pipeline), "__call__", partialmethod(type(pipeline).__call__, num_inference_steps=3))
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        exec(code, {})
        assert "is active in" in caplog.text


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl"])
def test_lora_files_for_diffusers_and_for_comfyui(models, tmp_path, family):
    trainer = start(settings(models(family), rank=2, lora_alpha=6, learning_rate=1e-2), tmp_path)
    trainer.run()
    folder = save_negative(trainer.state, "completed")
    pipeline = DiffusionPipeline.from_pretrained(models(family))
    pipeline.load_lora_weights(folder, weight_name="negative_kohya.safetensors")
    base, sample, time = trainer.state.base, torch.randn(1, 4, 8, 8), torch.tensor([300.0])
    with torch.no_grad():
        theirs, ours = (
            base.predict(model, sample, time, torch.tensor([0])) for model in (pipeline.unet, trainer.state.model)
        )
    torch.testing.assert_close(theirs, ours)

    kohya = load_file(folder / "negative_kohya.safetensors")
    # ComfyUI asks for lora_unet_ and the layer's path with underscores, then .lora_up.weight, .lora_down.weight and .alpha.
    paths = [path for path, layer in base.denoiser.named_modules() if isinstance(layer, BaseTunerLayer)]
    layers = {f"lora_unet_{path.replace('.', '_')}" for path in paths}
    assert kohya.keys() == {
        f"{layer}.{part}" for layer in layers for part in ("lora_up.weight", "lora_down.weight", "alpha")
    }
    assert {key: value.item() for key, value in kohya.items() if key.endswith("alpha")} == {
        f"{key}.alpha": 6.0 for key in layers
    }
    for name in ("negative_kohya.safetensors", "pytorch_lora_weights.safetensors"):
        with safe_open(folder / name, framework="pt") as file:
            header = file.metadata()
        assert header["modelspec.architecture"] == f"{base.family.architecture}/lora"
        assert {
            "modelspec.sai_model_spec",
            "modelspec.title",
            "modelspec.implementation",
            "ss_base_model_version",
        } <= header.keys()
    with safe_open(folder / "negative_kohya.safetensors", framework="pt") as file:
        assert (file.metadata()["ss_network_dim"], file.metadata()["ss_network_alpha"]) == ("2", "6.0")


def test_validation_grids_show_plain_beside_guided(models, tmp_path):
    config = settings(models("stable_diffusion"), validation_prompt=("a cat", "a dog"), validation_steps=2)
    trainer = start(config, tmp_path)
    trainer.run()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-000002.png", "step-000004.png"]
    assert trainer.state.base.asked(2).tolist() == [2, 3]
    first = (tmp_path / "samples" / "step-000004.png").read_bytes()
    save_grid(tmp_path / "samples" / "step-000004.png", trainer.state)
    assert (tmp_path / "samples" / "step-000004.png").read_bytes() == first  # fixed seeds


def test_pictures_without_memory_lose_pictures_and_no_run(models, tmp_path, capsys, monkeypatch):
    from selfnpo.train import main

    def fails(path, state):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    monkeypatch.setattr("selfnpo.training.trainer.save_grid", fails)
    assert main(settings(models("stable_diffusion"), output_dir=tmp_path / "out", validation_steps=2)) is None
    said = capsys.readouterr()
    assert (said.out + said.err).count("warning: no picture of step 4, out of memory (CUDA out of memory. Tried to") == 2
    assert (tmp_path / "out" / "negative" / "diffusion_pytorch_model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["status"] == "completed"
    assert (tmp_path / "out" / "checkpoint-4").is_dir()
    assert "samples with plain and with negative guidance" not in said.out


def test_metrics_record_the_cost(models, tmp_path, capsys):
    from selfnpo.train import main

    config = settings(models("stable_diffusion"), output_dir=tmp_path / "out", gradient_accumulation_steps=3)
    main(config)
    cost = json.loads((tmp_path / "out" / "metrics.json").read_text())["cost"]
    beside = cost["beside_steps_seconds"]
    whole = cost["seconds"] + cost["startup_seconds"] + beside["pictures"]
    assert all(0 < seconds < whole for seconds in beside.values())
    shares = ", ".join(f"{kind} {100 * seconds / whole:.1f} %" for kind, seconds in beside.items())
    said = capsys.readouterr().out
    assert f"time outside the steps: {shares} of {whole:.0f} s" in said
    assert [*beside] == ["logging", "relative_delta", "checkpoints", "pictures"]
    resumed = start(replace(config, resume_from_checkpoint="latest"), tmp_path / "out")
    assert all(0 < seconds <= beside[kind] for kind, seconds in resumed.state.beside.items() if kind != "pictures")
    assert cost["samples"] == 4 * 2 * 3
