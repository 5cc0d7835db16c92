"""Samples of plain guidance and of a negative, from the same noise: on one sheet, or one file per sample."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfnpo.config import preset_config
from selfnpo.models import PretrainedModel, load_negative
from selfnpo.sampling.config import SampleConfig
from selfnpo.sampling.ddim import plain_guidance, title
from selfnpo.sampling.decode import decode_frames, decode_samples, open_vae
from selfnpo.sampling.folder import SampleFolder, folder_names
from selfnpo.sampling.metadata import png_text
from selfnpo.sampling.picture import save_comparison, save_table, to_bytes
from selfnpo.sampling.sweep import Method, Missing, methods, sweep
from selfnpo.sampling.video import SUFFIXES, save_video


class Comparison:
    """Samples of plain guidance and of the negative, and how they are written.

    Args:
        prompts: what is asked for, in turn; empty: every class, or nothing.
        settings: see `settings_of`.
    """

    def __init__(
        self, config: SampleConfig, base: PretrainedModel, prompts: Sequence[str], count: int, settings: dict[str, Any]
    ):
        self.config, self.base, self.settings = config, base, settings
        asked = base.asked(len(prompts))
        turn = torch.arange(count) % len(asked)
        self.condition = asked[turn]
        names = prompts or [str(number) if len(asked) > 1 else "" for number in range(len(asked))]
        self.prompts = [names[number] for number in turn.tolist()]
        self.wide = min(len(asked), 10) if len(asked) > 1 else 4  # images in a row of a panel
        self.methods = methods(base, self.condition, settings["guidance_scale"], config.beta)

    def samples(self, missing: Missing | None = None) -> Iterator[tuple[Method, Sequence[int], Tensor]]:
        """As `sweep` has them."""
        config, base = self.config, self.base
        negative = load_negative(config.negative, base)
        tuned = load_negative(config.positive, base) if config.positive else None
        batch_size = config.batch_size or preset_config("default", base.family.presets).train_batch_size
        wanted = [method for row in self.methods for method in row]
        return sweep(
            base, negative, tuned, self.condition, wanted, config.seed, config.alpha, config.num_inference_steps, batch_size,
            missing,
        )  # fmt: skip

    def save_sheet(self, path: Path) -> None:
        """All samples as one picture, or as one video."""
        collected: dict[Method, list[Tensor]] = {}
        for method, _, batch in self.samples():
            collected.setdefault(method, []).append(batch)
        config, base, vae = self.config, self.base, open_vae(self.base)
        latents = {method: torch.cat(batches) for method, batches in collected.items()}
        labels = self.prompts if any(self.prompts) else []
        settings = self.settings | {"prompts": self.prompts}
        plain, guided = self.methods[0][:2]
        share = f", alpha = {config.alpha:g}" if config.positive else ""
        negatives = [f"negative, beta = {beta:g}{share}" for beta in config.beta]
        titles = [title(self._plain_name, plain.guidance_scale), title(negatives[0], guided.guidance_scale)]
        if path.suffix in SUFFIXES:
            videos = [[to_bytes(frames) for frames in decode_frames(base, latents[each], vae)] for each in (plain, guided)]
            save_video(path, titles, videos, config.fps, labels, png_text(settings)["selfnpo"])
            return
        images = {method: decode_samples(base, samples, vae) for method, samples in latents.items()}
        frames = len(images[plain]) // len(self.prompts)
        caption = f"negative model: {config.negative} | equal positions start from equal noise"
        text = png_text(settings)
        if frames > 1:
            caption += f" | {frames} frames of every video"
        if config.is_sweep:
            count = len(self.prompts)
            columns = frames if frames > 1 else 5 if count > 9 else math.ceil(math.sqrt(count))
            names = [f"guidance_scale\n{scale:g}" for scale in self.settings["guidance_scale"]]
            cells = [[images[method] for method in row] for row in self.methods]
            head = titles[0] if plain.guidance_scale == 1 else self._plain_name
            save_table(path, cells, names, [head, *negatives], columns, caption, labels, text)
        else:
            columns = frames if frames > 1 else min(self.wide, len(self.prompts))
            panels = [(name, images[method]) for name, method in zip(titles, (plain, guided), strict=True)]
            save_comparison(path, panels, columns, caption, labels, text)

    def save_folder(self, folder: SampleFolder) -> None:
        """One file per sample, batch by batch."""
        names = folder_names((method for row in self.methods for method in row), self.config.positive is not None)
        folder.prepare(list(names.values()), self.prompts, self.config.overwrite)
        vae, made = open_vae(self.base), 0
        for method, numbers, latents in self.samples(lambda method, batch: folder.missing(names[method], batch)):
            for number, frames in zip(numbers, decode_frames(self.base, latents, vae), strict=True):
                folder.save(names[method], number, frames, self._settings(method, number), self.config.fps)
                made += 1
        count, there = len(self.prompts), len(self.prompts) * len(names) - made
        found = f" ({there} were there already)" if there else ""
        print(f"written to {folder.folder}: {count} samples each in {', '.join(map('{}/'.format, names.values()))}{found}")

    @property
    def _plain_name(self) -> str:
        name = plain_guidance(self.base, self.condition, self.settings["guidance_scale"][0])[1]
        return "the positive itself" if self.config.positive and self.methods[0][0].guidance_scale == 1 else name

    def _settings(self, method: Method, number: int) -> dict[str, Any]:
        """Of one sample."""
        values = {"prompt": self.prompts[number]} | self.settings | {"guidance_scale": method.guidance_scale}
        others = {"prompts"} if method.beta is not None else {"prompts", "beta", "alpha", "negative", "negative_modified"}
        beta = {} if method.beta is None else {"beta": method.beta}
        return {name: value for name, value in (values | beta).items() if name not in others}
