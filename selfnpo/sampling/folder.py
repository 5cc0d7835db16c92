"""One file per image or video: a folder per method, in which equal names belong together."""

import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from selfnpo.errors import UserError
from selfnpo.files import write_text
from selfnpo.sampling.metadata import image_text, png_text
from selfnpo.sampling.picture import save_png, to_bytes
from selfnpo.sampling.sweep import Method
from selfnpo.sampling.video import save_video

RECORD, PROMPTS = "samples.json", "prompts.jsonl"
SAMPLE = re.compile(r"\d{6}\.(png|gif|mp4)")


def folder_names(methods: Iterable[Method], has_positive: bool) -> dict[Method, str]:
    """cfg and negative, in a sweep with their values: cfg_scale-3, negative_scale-3_beta-0.5."""
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
            beta = "" if method.beta is None else f"_beta-{method.beta:g}"
            found[method] += f"_scale-{method.guidance_scale:g}{beta}"
    return found


@dataclass
class SampleFolder:
    """Samples `000000.png`, `000001.png`, ... per method, and the settings that they were made with.

    A file is there whole or not at all, so a second call with the same settings makes only those that are missing.

    Args:
        settings: everything that the samples depend on.
        suffix: .png, or .gif or .mp4 of videos.
    """

    folder: Path
    settings: Mapping[str, Any]
    suffix: str

    def check(self, overwrite: bool) -> None:
        """Raise a UserError where the folder cannot be written, or holds other things than samples with these settings."""
        folder = self.folder
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise UserError(f"output_dir is {folder}, but {existing} is a file; expected a folder")
        try:
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as error:
            raise UserError(f"output_dir {folder} cannot be written: {error.strerror}; choose another folder") from error
        if not folder.is_dir() or not any(folder.iterdir()):
            return
        record = self._record()
        if record is None:  # not even with overwrite: `negative` may be a trained model
            raise UserError(
                f"output_dir {folder} is not empty and holds no {RECORD}, so its files are not samples of this command; "
                "choose another folder"
            )
        if not overwrite and (name := self._different(record["settings"])):
            before, now = (values.get(name) for values in (record["settings"], self.settings))
            got = "other prompts" if name == "prompts" else f"{name} {_shown(before)}, now it is {_shown(now)}"
            raise UserError(
                f"output_dir {folder} holds samples made with {got}; choose another folder, or pass --overwrite to replace "
                "them"
            )

    def is_complete(self, count: int) -> bool:
        """Whether an earlier call with the same settings made all of `count` samples."""
        record = self._record()
        if record is None or self._different(record["settings"]):
            return False
        return all(self.path(name, number).exists() for name in record["folders"] for number in range(count))

    def prepare(self, folders: Sequence[str], prompts: Sequence[str], overwrite: bool) -> None:
        """Remove the samples of an earlier call if they shall be overwritten, and write down what will be made."""
        record = self._record()
        if record is not None and (overwrite or self._different(record["settings"])):
            for folder in map(self.folder.joinpath, record["folders"]):
                others = [path for path in folder.glob("*") if not SAMPLE.fullmatch(path.name)]
                for path in {*folder.glob("*")}.difference(others):
                    path.unlink()
                if folder.is_dir() and not others:
                    folder.rmdir()
        for name in folders:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        write_text(self.folder / RECORD, json.dumps({"settings": self.settings, "folders": folders}, indent=1) + "\n")
        lines = ({"file_name": self.path("", number).name, "prompt": prompt} for number, prompt in enumerate(prompts))
        write_text(self.folder / PROMPTS, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))

    def missing(self, name: str, numbers: Iterable[int]) -> list[int]:
        return [number for number in numbers if not self.path(name, number).exists()]

    def path(self, name: str, number: int) -> Path:
        return self.folder / name / f"{number:06}{self.suffix}"

    def save(self, name: str, number: int, frames: Tensor, settings: Mapping[str, Any], fps: int) -> None:
        """Write one sample, frames `[n, channels, H, W]` in [-1, 1], with the settings that made it."""
        pixels = to_bytes(frames)
        _, height, width, _ = pixels.shape
        settings = {"image": number, "width": width, "height": height} | dict(settings)
        if self.suffix == ".png":
            save_png(self.path(name, number), Image.fromarray(pixels[0].numpy()), image_text(settings))
        else:
            save_video(self.path(name, number), [""], [[pixels]], fps, text=png_text(settings)["selfnpo"])

    def _record(self) -> dict[str, Any] | None:
        try:
            record = json.loads((self.folder / RECORD).read_text())
            return record if {"settings", "folders"} <= record.keys() else None
        except (OSError, ValueError, AttributeError):
            return None

    def _different(self, settings: Mapping[str, Any]) -> str | None:
        """The first setting that is another one."""
        own = json.loads(json.dumps(self.settings))  # lists in place of tuples
        return next((name for name in {**own, **settings} if own.get(name) != settings.get(name)), None)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
