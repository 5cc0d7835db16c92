"""python -m selfnpo.merge: whole models of theta + alpha eta + beta delta and theta - k delta, in bounded memory."""

import ctypes
import gc
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from commands import call
from fine_tunes import WEIGHTS, denoiser, fine_tune, save_both_loras, weights
from original_format import save_single_file
from selfnpo.export.merged import merge
from selfnpo.models import DEMO_FOLDER, ModelOptions, Source

DOCUMENT = Path(__file__).parents[1] / "docs" / "merging.md"


def fused(base: Path, lora: Path, scale: float = 1.0) -> dict[str, Tensor]:
    """The weights of a base under a LoRA, as plain diffusers merges them."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(lora)
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    return {key: tensor.double() for key, tensor in pipeline.unet.state_dict().items()}


def assert_combined(got, theta, negative, beta, positive=None, alpha=1.0):
    """Within a few roundings in float32."""
    assert got.keys() == theta.keys()
    for key, base in theta.items():
        offset = beta * (negative[key] - base) + (0 if positive is None else alpha * (positive[key] - base))
        assert ((got[key] - base - offset).abs() <= 2**-21 * (base.abs() + 1)).all(), key


@pytest.mark.parametrize("family", ["stable_diffusion", "unconditional", "unconditional_flat", "class_conditional"])
def test_full_weights(models, tmp_path, merged, family):
    base = models(family)
    negative, positive = fine_tune(base, tmp_path / "negative", 1), fine_tune(base, tmp_path / "positive", 2)
    model = denoiser(base)
    theta = {key: tensor.double() for key, tensor in model.state_dict().items()}
    whole = merged(base, negative)
    assert_combined(weights(whole), theta, weights(negative), 1)
    opened, info = type(model).from_pretrained(whole, output_loading_info=True)
    assert not any(info.values())
    assert opened.config["sample_size"] == model.config["sample_size"]
    assert all(tensor.equal(load_file(negative / WEIGHTS)[key]) for key, tensor in opened.state_dict().items())

    assert_combined(weights(merged(base, negative, "--extrapolate", 1.5)), theta, weights(negative), -1.5)
    shares = ("--positive", positive, "--alpha", 0.25, "--beta", 0.5)
    assert_combined(weights(merged(base, negative, *shares)), theta, weights(negative), 0.5, weights(positive), 0.25)
    forced = merged(base, negative, "--beta", -2, "--force")
    assert_combined(weights(forced), theta, weights(negative), -2)


@pytest.mark.parametrize("name", ["", "kohya.safetensors"])
@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl"])
def test_loras(models, tmp_path, merged, family, name):
    base = models(family)
    negative, positive = (save_both_loras(base, tmp_path / f"lora-{seed}", seed) for seed in (1, 2))
    theta, delta, eta = weights(base / "unet"), fused(base, negative), fused(base, positive)
    assert sum(not delta[key].equal(theta[key]) for key in theta) > 5
    assert_combined(weights(merged(base, negative / name, "--beta", 0.5)), theta, delta, 0.5)
    mixed = merged(base, negative / name, "--positive", positive / name, "--alpha", 0.5)
    assert_combined(weights(mixed), theta, delta, 1, eta, 0.5)

    # What users of LoRAs have without this command: a negative strength extrapolates.
    extrapolated = weights(merged(base, negative / name, "--extrapolate", 0.8))
    assert_combined(extrapolated, theta, delta, -0.8)
    assert_combined(extrapolated, theta, fused(base, negative, -0.8), 1)
    full = fine_tune(base, tmp_path / "full", 3)
    assert_combined(weights(merged(base, negative / name, "--positive", full, "--beta", 0)), theta, delta, 0, weights(full))


def test_the_demo_and_a_sample_of_what_was_written(tmp_path, merged, capsys):
    negative = fine_tune(DEMO_FOLDER, tmp_path / "negative", 1)
    folder = merged("demo", negative, "--extrapolate", 0.5)
    assert f"theta - 0.5 delta in float32; use it with --denoiser_name_or_path {folder}" in capsys.readouterr().out
    assert_combined(weights(folder), weights(DEMO_FOLDER / "transformer"), weights(negative), -0.5)
    assert call("sample", "--negative", negative, "--denoiser_name_or_path", folder, "--num_images", 2,
                "--num_inference_steps", 2, "--output", tmp_path / "a.png") == 0  # fmt: skip
    folder = merged("demo", negative, "--beta", 0.5)
    assert f"theta + 0.5 delta in float32; use it with --negative {folder}" in capsys.readouterr().out
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert file.metadata()["modelspec.title"] == f"theta + 0.5 delta of demo, {negative}"
        assert file.metadata()["modelspec.merged_from"] == f"demo, {negative}"


def in_half(base: Path, folder: Path, **options) -> Path:
    denoiser(base).half().save_pretrained(folder / "unet", **options)
    return folder


def test_the_precision_of_the_result(models, tmp_path, merged):
    base = in_half(models("stable_diffusion"), tmp_path / "half")
    negative = fine_tune(models("stable_diffusion"), tmp_path / "negative", 1)
    theta, delta = load_file(base / "unet" / WEIGHTS), load_file(negative / WEIGHTS)
    for flags, dtype in (((), torch.float16), (("--dtype", "bfloat16"), torch.bfloat16), (("--dtype", "float32"), None)):
        got = load_file(merged(base, negative, "--beta", 0.5, *flags) / WEIGHTS)
        for key, weight in got.items():  # computed in float32 and rounded once
            assert weight.equal(theta[key].float().lerp(delta[key], 0.5).to(dtype or torch.float32)), key


def test_shards_and_variants(models, tmp_path, merged, monkeypatch):
    plain = fine_tune(models("stable_diffusion"), tmp_path / "plain", 1)
    base = in_half(models("stable_diffusion"), tmp_path / "base", variant="fp16", max_shard_size="50KB")
    negative = fine_tune(models("stable_diffusion"), tmp_path / "negative", 1, max_shard_size="50KB")
    whole = load_file(merged(in_half(models("stable_diffusion"), tmp_path / "half"), plain, "--beta", 0.5) / WEIGHTS)
    monkeypatch.setattr("selfnpo.export.merged.MAX_SHARD_SIZE", "50KB")
    folder = merged(base, negative, "--beta", 0.5, "--variant", "fp16")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"diffusion_pytorch_model-00001-of-{len(shards):05}.safetensors"
    opened = type(denoiser(plain.parent / "half")).from_pretrained(folder, torch_dtype=torch.float16)
    assert all(tensor.equal(whole[key]) for key, tensor in opened.state_dict().items())
    monkeypatch.undo()
    assert sorted(path.name for path in merged(base, negative, "--variant", "fp16").iterdir()) == ["config.json", WEIGHTS]


def test_bases_that_diffusers_must_convert_or_change(models, tmp_path, merged):
    base = models("stable_diffusion")
    negative = fine_tune(base, tmp_path / "negative", 1)
    other, offset = fine_tune(base, tmp_path / "other", 2), save_both_loras(base, tmp_path / "lora", 3)
    file = save_single_file(base, tmp_path / "model.safetensors")
    got = merged(file, negative, "--extrapolate", 0.5, "--single_file_config", base)
    assert_combined(weights(got), weights(base / "unet"), weights(negative), -0.5)
    got = merged(base, file, "--denoiser_name_or_path", other, "--extrapolate", 0.5)
    assert_combined(weights(got), weights(other), weights(base / "unet"), -0.5)
    got = merged(base, offset, "--lora_name_or_path", offset, "--lora_scale", 0.5, "--beta", 0.25)
    assert_combined(weights(got), weights(base / "unet"), fused(base, offset), 0.75)


def test_files_of_older_versions(models, tmp_path, merged):
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    base = shutil.copytree(models("unconditional"), tmp_path / "old")
    negative = fine_tune(models("unconditional"), tmp_path / "negative", 1)
    for folder in (base / "unet", shutil.copytree(negative, tmp_path / "old-negative")):
        old = load_file(folder / WEIGHTS)
        for new, former in names.items():
            old = {key.replace(new, former): tensor for key, tensor in old.items()}
        save_file(old, folder / WEIGHTS, {"format": "pt"})
        assert "mid_block.attentions.0.query.weight" in old
    got = merged(base, tmp_path / "old-negative", "--extrapolate", 0.5)
    assert_combined(weights(got), weights(models("unconditional") / "unet"), weights(negative), -0.5)


def test_models_of_the_hub(models, tmp_path, merged, put_in_cache):
    base = models("stable_diffusion")
    put_in_cache(base, "somebody/base")
    put_in_cache(fine_tune(base, tmp_path / "negative", 1, max_shard_size="50KB"), "somebody/negative")
    put_in_cache(save_both_loras(base, tmp_path / "lora", 2), "somebody/lora")
    got = merged("somebody/base", "somebody/negative", "--positive", "somebody/lora", "--alpha", 0.5)
    negative, positive = weights(tmp_path / "negative"), fused(base, tmp_path / "lora")
    assert_combined(weights(got), weights(base / "unet"), negative, 1, positive, 0.5)


def test_the_commands_of_the_documentation(models, tmp_path, monkeypatch):
    """On tiny models; and what it says of LoRAs, in plain diffusers."""
    block = re.search(r"```bash\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[1].replace("\\\n", " ")
    base = models("stable_diffusion")
    monkeypatch.chdir(tmp_path)
    fine_tune(DEMO_FOLDER, Path("runs/demo/negative"), 1)
    fine_tune(base, Path("runs/sd15/negative"), 2)
    Path("runs/dpo-lora").mkdir()
    save_both_loras(base, Path("runs/dpo-lora/negative"), 3)
    for line in filter(None, block.splitlines()):
        if not line.startswith("#"):
            _, _, command, *arguments = shlex.split(line)
            few = ["--num_images", 2, "--num_inference_steps", 2] if command == "selfnpo.sample" else []
            on_tiny = [base if re.match("stable-diffusion-v1-5/|mhdang/", each) else each for each in arguments]
            assert call(command.removeprefix("selfnpo."), *on_tiny, *few) == 0
    assert {path.name for path in Path("runs/dpo-negative").iterdir()} == {"config.json", WEIGHTS}

    pipe = DiffusionPipeline.from_pretrained(base)
    merged = type(pipe.unet).from_pretrained("runs/dpo-away").float()
    pipe.load_lora_weights("runs/dpo-lora/negative")
    inputs = (torch.randn(1, 4, 8, 8), 300, torch.randn(1, 77, tiny.WIDTH))
    with torch.no_grad():
        changed = pipe.unet(*inputs).sample
        pipe.set_adapters(pipe.get_active_adapters(), -0.5)
        extrapolated = pipe.unet(*inputs).sample
        distance = (merged(*inputs).sample - extrapolated).abs().max()
    assert distance < 1e-2 * (changed - extrapolated).abs().max()  # float16


def resident(line: str) -> int:
    """Bytes of this process in memory, as a line of /proc/self/status says."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(each.split()[1]) for each in lines if each.startswith(line)) * 1024


def growth(function) -> int:
    """How far memory rises above what it is, mapped files included, while a function runs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    function()
    return resident("VmHWM:") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read as Linux tells it")
def test_memory_for_a_few_tensors_at_a_time(models, tmp_path):
    model = type(denoiser(models("class_conditional")))(
        num_attention_heads=16, attention_head_dim=48, in_channels=4, out_channels=8, num_layers=6, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1,
    )  # fmt: skip
    base = tmp_path / "base"
    model.save_pretrained(base / "transformer")
    sizes = [weight.nbytes for weight in model.parameters()]
    assert sum(sizes) > 250e6
    del model
    source, folder = Source(ModelOptions(str(base))), tmp_path / "merged"
    peak = growth(lambda: merge(source, str(base), folder, positive=str(base), beta=-0.5))
    assert peak < 8 * max(sizes) < sum(sizes) / 2, peak  # base, negative, positive, eta and result, six today
    assert (folder / WEIGHTS).stat().st_size > sum(sizes)
    assert growth(lambda: denoiser(base)) > 0.9 * sum(sizes)  # so it is measured
