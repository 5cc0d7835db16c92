"""The Python of the pages below, run as it stands on tiny models of the same families."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from fine_tunes import changed
from pipelines import CASES, SD, denoiser_of, load, save_lora

ROOT = Path(__file__).parents[2]
PAGES = {
    name: re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    for name in ("docs/diffusers.md", "docs/kernels.md", "README.md")
}


@pytest.fixture
def tiny_models(models, tmp_path, monkeypatch):
    """Tiny models under the names in the pages: ids of the hub lie in a folder as local ones do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    base = load(models(SD))
    for name, pipe in (
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", base),
        ("facebook/DiT-XL-2-256", CASES["DiT"].pipe(models)),
        ("google/ddpm-cifar10-32", CASES["DDPM"].pipe(models)),
    ):
        pipe.save_pretrained(name)
    for name, pipe in (("sd15", base), ("dit", load("facebook/DiT-XL-2-256")), ("ddpm", load("google/ddpm-cifar10-32"))):
        changed(denoiser_of(pipe)).save_pretrained(f"runs/{name}/negative")
    changed(base.unet, seed=3).save_pretrained("mhdang/dpo-sd1.5-text2image-v1")
    save_lora(Path("runs/dpo-lora/negative"), base)
    save_lora(Path("runs/style"), base, seed=4)


@pytest.mark.parametrize("page", PAGES)
def test_python(tiny_models, page, caplog):
    names = {}
    for block in PAGES[page]:
        names.pop("image", None)
        exec(compile(block, page, "exec"), names)
        if "guide(" in block:
            assert isinstance(names["image"], Image.Image)
            assert "is active in" in caplog.text
            caplog.clear()
    assert {"guide", "torch"} & names.keys()
