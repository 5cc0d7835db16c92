"""What commands print: progress without a terminal, and no line of a library."""

import os
import re
import subprocess
import sys
from pathlib import Path

from selfnpo import output

ROOT = Path(__file__).parents[1]
# Commands one after the other in one process, each as its module would start it.
SCRIPT = """
import shlex, sys
from importlib import import_module
from selfnpo.cli import run
for line in sys.stdin.read().splitlines():
    name, *arguments = shlex.split(line)
    try:
        run(lambda: import_module(f"selfnpo.{name}").command(arguments))
    except SystemExit as ended:
        if ended.code:
            sys.exit(f"{line} ended with {ended.code}")
"""
# What a library's line looks like: a warning, a logger's prefix, an advice to install, a module's path.
FOREIGN = re.compile(
    r"Warning|warn\(|Failed to|deprecat|torchvision|\[transformers\]|\[diffusers\]|site-packages|it/s\]|%\||"
    r"Loading (weights|pipeline)|^W\d{4}|^[A-Z]+:|Traceback|pip install"
)


def test_progress_is_lines_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(output, "LINE_SECONDS", 0)
    for _ in output.progress(range(3), desc="judge", unit="sample"):
        pass
    said = capsys.readouterr().err
    assert said.splitlines()[0].startswith("judge: 0 of 3, ")  # at once
    assert said.splitlines()[-1].startswith("judge: 3 of 3, ")
    assert not any(character in said for character in "\r\x1b")


def test_lines_are_seconds_apart(capsys):
    for _ in output.progress(range(100_000), desc="train", unit="step"):
        pass
    assert 1 <= len(capsys.readouterr().err.splitlines()) <= 2


def test_no_command_shows_a_line_of_a_library(models, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    short = "--max_train_steps 2 --train_batch_size 2 --num_inference_steps 10 --pool_size 1"
    sd, dit = (models(name) for name in ("stable_diffusion", "class_conditional"))
    lines = [
        "env",
        f"train {short} --model {sd} --prompts prompts.txt --rank 4 --output_dir lora --mixed_precision bf16",
        f"train {short} --model {sd} --prompts prompts.txt --use_8bit_adam --output_dir full",
        f"train {short} --model {dit} --output_dir dit --report_to tensorboard",
        f"sample --model {sd} --negative lora/negative --prompt cat --num_inference_steps 10 --num_images 1",
        f"merge --model {sd} --negative lora/negative --output_dir merged",
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input="\n".join(lines), capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = (done.stdout + done.stderr).splitlines()
    assert not [line for line in said if FOREIGN.search(line)]
    assert "loading PyTorch and diffusers" in said
