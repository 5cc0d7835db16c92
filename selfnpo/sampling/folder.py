"""One file per image or video, in one folder per method; files with the same name belong together."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from selfnpo.files import write_text
from selfnpo.sampling.config import RECORD
from selfnpo.sampling.metadata import image_text, png_text
from selfnpo.sampling.picture import save_png, to_bytes
from selfnpo.sampling.sweep import Method
from selfnpo.sampling.video import save_video

PROMPTS = "prompts.jsonl"
SAMPLE = re.compile(r"(cfg|negative|base|positive)(_scale-.+)?/\d{4,}\.(png|gif|mp4)")


def folder_names(methods: Iterable[Method], has_positive: bool) -> dict[Method, str]:
    """Folder names: cfg and negative, or with their values in a sweep: cfg_scale-3, negative_scale-3_beta-0.5."""
    methods = list(dict.fromkeys(methods))
    is_sweep = sum(method.beta is not None for method in methods) > 1
    unguided = "positive" if has_positive else "base"
    found = {}
    for method in methods:
        if method.beta is None and method.guidance_scale == 1:
            found[method] = unguided
            continue
        found[method] = "cfg" if method.beta is None else "negative"
        if is_sweep:
            beta = "" if method.beta is None else f"_beta-{_number(method.beta)}"
            found[method] += f"_scale-{_number(method.guidance_scale)}{beta}"
    return found


def _number(value: float) -> str:
    """3 for 3.0; different values never look the same."""
    return repr(float(value)).removesuffix(".0")


@dataclass(frozen=True)
class SampleFolder:
    """Samples `0000.png`, `0001.png`, ... in one folder per method, with their prompts and settings.

    Args:
        suffix: .png, or .gif or .mp4 for videos.
    """

    folder: Path
    suffix: str

    def prepare(self, names: Iterable[str], prompts: Sequence[str], settings: Mapping[str, Any]) -> None:
        """Remove the samples of an earlier call, and write the prompts and settings.

        Args:
            names: the methods' folders.
        """
        samples = [path for path in self.folder.glob("*/*") if SAMPLE.fullmatch(path.relative_to(self.folder).as_posix())]
        for path in samples:
            path.unlink()
        for folder in {path.parent for path in samples}:
            if not any(folder.iterdir()):
                folder.rmdir()
        for name in names:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        write_text(self.folder / RECORD, json.dumps(settings, indent=1) + "\n")
        lines = ({"file_name": self.path("", number).name, "prompt": prompt} for number, prompt in enumerate(prompts))
        write_text(self.folder / PROMPTS, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))

    def path(self, name: str, number: int) -> Path:
        return self.folder / name / f"{number:04}{self.suffix}"

    def save(self, name: str, number: int, frames: Tensor, settings: Mapping[str, Any], fps: int) -> None:
        """Write one sample, frames `[n, channels, H, W]` in [-1, 1], with its settings as metadata."""
        pixels = to_bytes(frames)
        _, height, width, _ = pixels.shape
        settings = {"image": number, "width": width, "height": height} | dict(settings)
        if self.suffix == ".png":
            save_png(self.path(name, number), Image.fromarray(pixels[0].numpy()), image_text(settings))
        else:
            save_video(self.path(name, number), [""], [[pixels]], fps, text=png_text(settings)["selfnpo"])
