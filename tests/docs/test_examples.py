"""The scripts in examples/, run small."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from diffusers import DiTTransformer2DModel
from PIL import Image

from fine_tunes import changed

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def script(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return script


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "guide_pipeline", "train_from_python", "kernels_alone", "evaluate_two_arms"
    }  # fmt: skip


def test_guide_pipeline(run, models, pipe, tmp_path):
    changed(pipe.unet).save_pretrained(tmp_path / "negative")
    run("guide_pipeline", models("stable_diffusion"), tmp_path / "negative", "a cat", "--num_inference_steps", 2)
    picture = Image.open(tmp_path / "guided.png")
    plain, guided = (picture.crop((left, 0, left + picture.height, picture.height)) for left in (0, picture.height))
    assert plain.tobytes() != guided.tobytes()


def test_train_from_python(run):
    assert "step 3: loss 0." in run("train_from_python", "--max_train_steps", 3)
    assert DiTTransformer2DModel.from_pretrained("negative").num_parameters() > 400_000


def test_kernels_alone_learn_two_rings(run):
    output = run("kernels_alone")
    inner, outer = map(float, re.search(r"ring 0: ([\d.]+), of ring 1: ([\d.]+)", output).groups())
    assert (inner, outer) == (pytest.approx(1, abs=0.15), pytest.approx(2, abs=0.25))


def test_evaluate_two_arms(run):
    output = run("evaluate_two_arms", "--max_train_steps", 2, "--num_samples", 200, "--seeds", 1, 2)
    assert re.search(r"fd\n  l2 +[\d.]+ ± [\d.]+, minus cfg: [+-][\d.]+ ± [\d.]+\n  huber", output)
