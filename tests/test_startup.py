"""Help and mistakes are answered before anything slow is imported, in one sentence."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from selfnpo.__main__ import COMMANDS
from selfnpo.cli import BACKENDS
from selfnpo.models import DEMO_FOLDER, FAMILIES
from selfnpo.models.source import DENOISERS
from selfnpo_kernels import dispatch

SLOW = ("torch", "diffusers", "transformers", "peft", "sklearn", "matplotlib")
# Runs a command as `python -m` does, and says what it has imported.
SCRIPT = """
import atexit, runpy, sys
sys.argv = ["selfnpo", *sys.argv[1:]]
atexit.register(lambda: print("imported:", *(name for name in {slow} if name in sys.modules), file=sys.stderr))
runpy.run_module("selfnpo", run_name="__main__")
"""


def selfnpo(*arguments: object, code: str = SCRIPT.format(slow=SLOW), **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_pytorch(command):
    done = selfnpo(command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: selfnpo {command} [-h]")
    assert done.stderr == "imported:\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "usage: selfnpo COMMAND"),
        (("--help",), "usage: selfnpo COMMAND"),
        (("--version",), "selfnpo 0."),
        (("trian",), "unknown command 'trian'; did you mean train?"),
        (("--versions",), "unknown command '--versions'; did you mean --version?"),
        (("fly",), "unknown command 'fly'; expected one of train, sample, merge, evaluate, env"),
        (("train", "--learning_rat", "1"), "unknown flag --learning_rat; did you mean --learning_rate?"),
        (("train", "--network-dims", "1"), "unknown flag --network-dims; did you mean --network_dim?"),
        (("sample", "--guidance", "3"), "unknown flag --guidance; did you mean --guidance_scale"),
        (("merge", "--xyzzy"), "unknown flag --xyzzy; --help lists all flags"),
        (("train", "--compile", "yes"), "unexpected argument 'yes'"),
        (("env", "x"), "unexpected argument 'x'"),
        (("train", "--no_low_vra"), "unknown flag --no_low_vra; did you mean --no_low_vram?"),
        (("train", "--max_train_steps"), "max_train_steps has no value; expected a whole number"),
        (("train", "--max_train_steps", "many"), "max_train_steps is 'many'; expected a whole number"),
        (("train", "--preset", "best"), "preset is 'best'; expected one of default, paper, released"),
        (("train", "--lora_rank=1.5"), "rank is '1.5'; expected a whole number"),
        (("train", "--height", "tall"), "height is 'tall'; expected a whole number"),
        (("train", "--original_size", "1", "b"), "original_size is '1 b'; expected 2 values, each a whole number"),
        (("train", "--crops_coords_top_left", "1"), "crops_coords_top_left is '1'; expected 2 values, each a whole number"),
        (("sample", "--beta", "much"), "beta is 'much'; expected one or more values, each a number"),
        (("merge", "--dtype", "int8"), "dtype is 'int8'; expected one of float32, float16, bfloat16"),
        (("train", "--max_train_steps", "0"), "max_train_steps is 0; expected a value from 1"),
        (("train", "--config", "no.yaml"), "config no.yaml could not be read"),
        (("train", "--prompts", "no.txt"), "prompts no.txt could not be read"),
        (("train", "--train_data_dir", "no", "--preset", "released"), "train_data_dir no is not a folder"),
        (("train", "--model", "nobody/nothing"), "nobody/nothing "),
        (("train", "--lora_name_or_path", "no.safetensors"), "no.safetensors does not exist"),
        (("train", "--output_dir", "/proc/selfnpo"), "output_dir /proc/selfnpo cannot be written"),
        (("train", "--output_dir", "full"), "output_dir full exists and is not empty"),
        (("train", "--resume", "latest"), "has no intact checkpoint"),
        (("train", "--model", "flow"), "which cannot be trained here"),
        (("sample", "--negative", "nobody/nothing"), "nobody/nothing "),
        (("sample", "--negative", DEMO_FOLDER, "--output", "full/file"), "output full/file exists"),
        (("sample", "--negative", DEMO_FOLDER, "--output", "no/such.png"), "does not exist"),
        (
            ("sample", "--negative", DEMO_FOLDER, "--output", "x.tiff"),
            "output is x.tiff; expected a file name that ends in .png",
        ),
        (("train", "--resolution", "64"), "resolution is 64, but the model is the embedded demo"),
        (("train", "--prompts", "full/file", "--prompt_dataset", "a:b"), "prompts and prompt_dataset are both given"),
        (("train", "--prompts", "prompts.txt"), "prompts is prompts.txt, but the model is the embedded demo"),
        (("train", "--model", "flow", "--preset", "released"), "but no images are given; pass --train_data_dir"),
        (("train", "--model", "full", "--resume", "no"), "resume_from_checkpoint is no, which is not a folder"),
        (("train", "--model", "run"), "run is the folder of a training run; did you mean run/negative?"),
        (("train", "--pretrained_model", "x"), "did you mean --pretrained_model_name_or_path?"),
        (("train", "--config", "bad.yaml"), "bad.yaml could not be read as YAML: expected"),
        (("train", "--lora_name_or_path", "../no/lora"), "../no/lora does not exist; expected a diffusers folder"),
        (("train", "--model", "full", "--lora_name_or_path", "run/negative", "--lora_scale", "0"), "LoRA would do nothing"),
        (("sample", "--model="), "pretrained_model_name_or_path is empty; expected a name or a path"),
        (("sample", "--negative="), "negative is empty; expected a name or a path"),
        (("sample", "--prompt", "a\udcff"), r"'a\udcff' is not UTF-8; expected UTF-8"),
        (("sample", "--negative", "prompts.txt"), "prompts.txt is not a .safetensors file"),
        (("sample", "--negative", DEMO_FOLDER, "--output", "/proc/x.png"), "output /proc/x.png cannot be written"),
        (("sample", "--negative", DEMO_FOLDER, "--output", f"{'x' * 250}.png"), "cannot be written: File name too long"),
        (("sample", "--num_inference_steps", "0"), "num_inference_steps is 0; expected a value from 1"),
        (("sample", "--beta", "1e300", "--force"), "beta is 1e+300; expected a finite number below 1,000,000"),
        (("merge", "--extrapolate", "1e300"), "extrapolate is 1e+300; expected a finite number above 0 and below"),
        (
            ("merge", "--negative", "run/negative", "--output_dir", "run/negative"),
            "run/negative would be replaced",
        ),
        (("merge", "--model", "flow", "--output_dir", "flow/transformer"), "but this command reads flow; choose another"),
        (("train", "--output_dir", "x" * 300), "cannot be opened or written: File name too long"),
        (("train", "--lora_alpha", "inf", "--rank", "2"), "lora_alpha is inf; expected a positive number"),
        (("train", "--max_relative_delta", "inf"), "max_relative_delta is inf; expected a positive number"),
        (("train", "--output_dir", "run", "--overwrite", "--model", "run/negative"), "but this command reads run/negative"),
        (("evaluate", "--arms", "self-npo", "self-npo"), "arms is self-npo self-npo; expected different arms"),
        (("sample", "--negative", "demo"), "demo is the embedded model"),
        (("sample", "--model", "full"), "runs/demo/negative does not exist"),
        (("train", "--num_rollout_steps", "3"), "num_rollout_steps is 3, but only --rollout data uses it"),
        (("sample", "--guidance_scale", "0.5"), "guidance_scale is 0.5; expected a value above 1"),
        (("merge", "--beta", "2"), "beta is 2.0; expected a value from 0 to 1"),
        (("merge", "--negative", "no.safetensors"), "no.safetensors does not exist"),
        (("evaluate", "--num_samples", "3"), "num_samples is 3; expected a value from 200"),
        (("evaluate", "--negative", "nobody/nothing"), "nobody/nothing "),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_mistakes_need_no_pytorch(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "flow" / "transformer").mkdir(parents=True)
    (tmp_path / "flow" / "transformer" / "config.json").write_text('{"_class_name": "SD3Transformer2DModel"}')
    (tmp_path / "run" / "negative").mkdir(parents=True)
    (tmp_path / "run" / "negative" / "config.json").write_text("{}")
    (tmp_path / "prompts.txt").write_text("a cat")
    (tmp_path / "bad.yaml").write_text("rank: 1\nseed: [")
    before = {*tmp_path.rglob("*")}
    done = selfnpo(*arguments, PYTHONPATH=str(Path(__file__).parents[1]))
    errors = done.stderr.removesuffix("imported:\n")
    assert errors != done.stderr, done.stderr  # nothing slow was imported
    said = done.stdout if done.returncode == 0 else errors
    assert sentence in said
    if done.returncode:
        assert done.returncode == 2
        assert errors.startswith("error: ")
        assert len(errors.splitlines()) == 1
    assert {*tmp_path.rglob("*")} == before


def test_an_unknown_backend_needs_no_pytorch():
    assert BACKENDS == dispatch.BACKENDS
    for name, sentence in (("cuda", "expected one of reference, cpp, triton, or"), ("trition", "did you mean triton?")):
        done = selfnpo("train", SELFNPO_BACKEND=name)
        assert done.returncode == 2
        said, imported = done.stderr.splitlines()
        assert said.startswith(f"error: SELFNPO_BACKEND is '{name}'; {sentence}")
        assert imported == "imported:"


@pytest.mark.parametrize(
    "arguments",
    [*((command, "--help") for command in (*COMMANDS, "demo.base")), ("train", "--model", "nobody/nothing"), ("env", "--x")],
    ids=" ".join,
)
def test_help_and_mistakes_take_less_than_two_seconds_of_cpu(arguments):
    command, *flags = arguments
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", f"selfnpo.{command}", *flags], capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_modules_answer_as_the_command_does():
    done = subprocess.run([sys.executable, "-m", "selfnpo.train", "--help"], capture_output=True, text=True)
    assert done.stdout.startswith("usage: python -m selfnpo.train [-h]")
    done = subprocess.run([sys.executable, "-m", "selfnpo.demo.base"], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "error: --output_dir is missing; pass --output_dir PATH" in done.stderr
    done = subprocess.run([sys.executable, "-m", "selfnpo.demo.base", "--outdir", "x"], capture_output=True, text=True)
    assert done.stderr == "error: unknown flag --outdir; did you mean --output_dir?\n"


def test_the_denoisers_that_are_known_are_those_of_the_families():
    found = {name for each in FAMILIES for name in (each.denoiser_class.__name__, *each.former_class_names)}
    assert sorted(found) == sorted(DENOISERS)


@pytest.mark.parametrize(
    ("pipe", "code", "sentence"),
    [("| true", 141, ""), (">/dev/full", 2, "error: the output cannot be opened or written: No space left"), (">&-", 0, "")],
)
def test_output_that_cannot_be_written(pipe, code, sentence):
    command = f"{sys.executable} -m selfnpo train --help {pipe}; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert int(done.stdout.splitlines()[-1]) == code
    assert done.stderr.startswith(sentence)
    assert len(done.stderr.splitlines()) == bool(sentence)
