"""What users get wrong with python -m selfnpo.merge: one sentence, exit code 2, and nothing written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from commands import call
from fine_tunes import WEIGHTS, fine_tune, save_both_loras
from selfnpo.errors import UserError
from selfnpo.models import DEMO, DEMO_FOLDER
from selfnpo.output import check_kept


@pytest.fixture
def refused(tmp_path, capsys):
    """Asserts that a merge ends in one sentence that holds `sentence`, and leaves no trace."""

    def check(base, negative, sentence, *flags):
        before = sorted(tmp_path.rglob("*"))
        model = ("--pretrained_model_name_or_path", base, "--negative", negative, "--output_dir", tmp_path / "out")
        assert call("merge", *model, *flags) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert sentence in last
        assert sorted(tmp_path.rglob("*")) == before

    return check


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--extrapolate", 0], "extrapolate is 0.0; expected a finite number above 0"),
        (["--extrapolate", "nan"], "extrapolate is nan"),
        (["--extrapolate", "inf", "--force"], "extrapolate is inf"),
        (["--extrapolate", 1, "--beta", 0.5], "leave out --positive, --alpha and --beta"),
        (["--extrapolate", 1, "--positive", "x"], "leave out --positive, --alpha and --beta"),
        (["--beta", 1.5], "beta is 1.5; expected a value from 0 to 1, or any with --force"),
        (["--beta", "nan", "--force"], "beta is nan; expected a finite number"),
        (["--positive", "x", "--alpha", -1], "alpha is -1.0; expected a value from 0 to 1"),
        (["--alpha", 0.5], "alpha is 0.5, but it only applies to a positive model; pass --positive"),
        (["--positive", "nobody/nothing"], "nobody/nothing was not found locally or on the hub"),
        (["--positive", "absent.safetensors"], "absent.safetensors"),
    ],
)
def test_flags(models, tmp_path, refused, flags, sentence):
    base = models("stable_diffusion")
    refused(base, base, sentence, *flags)


def test_models_that_do_not_fit(models, tmp_path, refused):
    base = models("stable_diffusion")
    tiny.unet(cross_attention_dim=24).save_pretrained(tmp_path / "other")
    first = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight is [16, 24], expected [16, 32]"
    refused(base, tmp_path / "other", f"other has a different architecture than the base: {first}")
    refused(base, base, first, "--positive", tmp_path / "other")
    xl = save_both_loras(models("stable_diffusion_xl"), tmp_path / "xl", 1)
    refused(base, xl, "is a LoRA for another base")
    refused(models("class_conditional"), xl, "but diffusers does not support LoRAs for DiTPipeline")
    refused(base, models("class_conditional"), "contains neither config.json nor unet/config.json")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    refused(base, tmp_path / "broken.safetensors", "broken.safetensors could not be read as safetensors")

    cut = fine_tune(base, tmp_path / "cut", 1)
    content = load_file(cut / WEIGHTS)
    del content["conv_in.bias"]
    save_file(content, cut / WEIGHTS)
    refused(base, cut, "does not fit its config.json: missing keys such as conv_in.bias")
    (cut / WEIGHTS).write_bytes(b"no weights")
    refused(base, cut, "could not be read as safetensors")
    (cut / WEIGHTS).unlink()
    refused(base, cut, "cut contains no weights; expected UNet2DConditionModel weights")


def test_weights_that_are_no_numbers(models, tmp_path, refused):
    base = models("stable_diffusion")
    for name, value in (("infinite", torch.inf), ("nan", torch.nan), ("large", 1e30)):
        content = load_file(fine_tune(base, tmp_path / name, 1) / WEIGHTS)
        content["mid_block.resnets.0.conv1.bias"][3] = value
        save_file(content, tmp_path / name / WEIGHTS, {"format": "pt"})
    for name in ("infinite", "nan"):
        refused(
            base, tmp_path / name, f"{name} contains weights that are inf or NaN, such as mid_block.resnets.0.conv1.bias"
        )
    shutil.copytree(tmp_path / "nan", tmp_path / "base" / "unet")
    refused(tmp_path / "base", tmp_path / "large", "base contains weights that are inf or NaN")
    too_large = "the result's mid_block.resnets.0.conv1.bias is too large for float16; pass --dtype bfloat16 or float32"
    refused(base, tmp_path / "large", too_large, "--dtype", "float16")


def test_folders_that_hold_something(models, tmp_path, refused, merged, monkeypatch):
    base = models("stable_diffusion")
    negative, out = fine_tune(base, tmp_path / "negative", 1), tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    refused(base, negative, "exists and is not empty; choose another or pass --overwrite to replace")
    (out / "thesis.txt").write_text("mine")
    refused(
        base, negative, "out contains thesis.txt, which is not part of a merged model; choose another folder", "--overwrite"
    )
    refused(base, negative, "is a file; expected a folder", "--output_dir", out / "thesis.txt", "--overwrite")
    (out / "thesis.txt").unlink()
    monkeypatch.chdir(out)
    refused(base, negative, "output_dir . exists and is not empty", "--output_dir", ".")
    assert call("merge", "--negative", DEMO_FOLDER, "--output_dir", ".", "--overwrite") == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.json", WEIGHTS]
    shutil.move(out, tmp_path / "merged")
    assert json.loads((merged(base, negative) / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"


def test_only_the_folders_that_are_read_are_kept(tmp_path):
    for name in ("unet", "merged", "lora"):
        (tmp_path / name).mkdir()
    (tmp_path / "lora" / "a.safetensors").touch()
    sources = (tmp_path, None, DEMO, tmp_path / "lora" / "a.safetensors", "nobody/nothing")
    check_kept(tmp_path / "merged", sources)  # beside the parts of a model
    for name in (".", "unet", "lora"):
        with pytest.raises(UserError, match="would be replaced, but this command reads"):
            check_kept(tmp_path / name, sources)
