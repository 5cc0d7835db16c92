"""What commands print: no line of a library."""

import os
import re
import subprocess
import sys
from pathlib import Path

from selfnpo.models import DEMO_FOLDER

ROOT = Path(__file__).parents[1]
# Commands one after the other in one process, each as its module would start it. What a file of this project prints, also by
# way of the standard library or tqdm, begins with a mark; what is written past Python, as C++ libraries do, has none.
SCRIPT = """
import shlex, sys
from importlib import import_module
from pathlib import Path

ROOT, TOOLS = sys.argv[1], (str(Path(shlex.__file__).parent) + "/", "/tqdm/", "<")

class Marked:
    def __init__(self, stream):
        self.stream, self.start = stream, True

    def write(self, text):
        frame = sys._getframe(1)
        while frame.f_back and (
            frame.f_code.co_name == "show"  # our way to show the warnings of others
            or ("site-packages" not in frame.f_code.co_filename and frame.f_code.co_filename.startswith(TOOLS))
            or "/tqdm/" in frame.f_code.co_filename
        ):
            frame = frame.f_back
        mark = "ours: " if frame.f_code.co_filename.startswith(ROOT) else f"{frame.f_code.co_filename}: "
        for line in text.splitlines(keepends=True):
            self.stream.write(mark * self.start + line)
            self.start = line.endswith("\\n")
        return len(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)

sys.stdout, sys.stderr = Marked(sys.stdout), Marked(sys.stderr)
from selfnpo.cli import run
for line in sys.stdin.read().splitlines():
    name, *arguments = shlex.split(line)
    try:
        run(lambda: import_module(f"selfnpo.{name}").command(arguments))
    except SystemExit as ended:
        if ended.code:
            sys.exit(f"{line} ended with {ended.code}")
"""
# The looks of a library's line that our own code would hand on, and of a bar that is drawn over itself.
FOREIGN = re.compile(r"Warning|warn\(|deprecat|site-packages|it/s|\r|\x1b|Traceback|None")


def test_no_command_shows_a_line_of_a_library(models, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    short = "--max_train_steps 2 --train_batch_size 2 --num_inference_steps 10 --pool_size 1 --num_validation_images 1"
    lines = [
        "env",
        f"train {short} --model {models('stable_diffusion')} --prompts prompts.txt --rank 4 --output_dir lora "
        "--mixed_precision bf16 --report_to tensorboard",
        f"train {short} --model {models('stable_diffusion')} --prompts prompts.txt --use_8bit_adam --output_dir full",
        f"train {short} --model {models('stable_diffusion_xl')} --rank 4 --use_8bit_adam --output_dir xl",
        f"train {short} --model {models('cogvideox')} --rank 4 --output_dir video",
        f"train {short} --model {models('class_conditional')} --output_dir classes",
        f"train {short} --model {models('unconditional')} --low_vram --output_dir plain",
        f"train {short} --model {DEMO_FOLDER} --output_dir demo",
        f"sample --model {models('stable_diffusion')} --negative lora/negative --prompt cat --num_inference_steps 10",
        f"sample --model {models('cogvideox')} --negative video/negative --num_inference_steps 10 --output_dir videos",
        f"merge --model {models('stable_diffusion')} --negative lora/negative --positive full/negative --output_dir merged",
        "evaluate --negative demo/negative --num_samples 200 --seeds 1 2 --guidance_scales 2 --output_dir judged",
        "demo.base --max_train_steps 2 --output_dir base",
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT)], input="\n".join(lines), capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = (done.stdout + done.stderr).splitlines()
    assert [line for line in said if not line.startswith("ours: ") or FOREIGN.search(line)] == []
    for part in ("loading PyTorch and diffusers", "train: 2 of 2 steps", "written to merged", "base model: base"):
        assert any(line.startswith(f"ours: {part}") for line in said), part
