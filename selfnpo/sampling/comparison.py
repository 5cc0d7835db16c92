"""Compare plain guidance with a negative, from the same noise: on one sheet, or one file per sample."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfnpo.config import preset_config
from selfnpo.mixing import same_weights
from selfnpo.models import PretrainedModel, load_negative
from selfnpo.options import ModelOptions, SampleOptions, changed
from selfnpo.sampling.config import FPS, VIDEOS, SampleConfig
from selfnpo.sampling.ddim import plain_guidance, title
from selfnpo.sampling.decode import decode_frames, decode_samples, open_vae
from selfnpo.sampling.folder import SampleFolder, folder_names
from selfnpo.sampling.metadata import png_text
from selfnpo.sampling.picture import save_comparison, save_table, to_bytes
from selfnpo.sampling.sweep import Method, methods, sweep
from selfnpo.sampling.video import save_video


class Comparison:
    """Samples with plain guidance and with the negative, and how to save them.

    Args:
        prompts: prompts or class numbers, used in turn. Empty: every class, or the empty prompt.
        count: number of images or videos per method.
    """

    def __init__(self, config: SampleConfig, base: PretrainedModel, prompts: Sequence[str], count: int):
        self.config, self.base = config, base
        self.scales = config.guidance_scale or (base.family.guidance_scale,)
        asked = base.asked(len(prompts))
        turn = torch.arange(count) % len(asked)
        self.condition = asked[turn]
        names = prompts or [str(number) if len(asked) > 1 else "" for number in range(len(asked))]
        self.prompts = [names[number] for number in turn.tolist()]
        self.wide = min(len(asked), 10) if len(asked) > 1 else 4  # images per row of a panel
        self.methods = methods(base, self.condition, self.scales, config.beta)

    def samples(self) -> Iterator[tuple[Method, range, Tensor]]:
        """Yields what `sweep` yields."""
        config, base = self.config, self.base
        negative = load_negative(config.negative, base)
        tuned = load_negative(config.positive, base) if config.positive else None
        if same_weights(negative, base.denoiser):
            print(
                f"warning: {config.negative} has the weights of the base itself, so it changes nothing; expected a fine-tune"
            )
        batch_size = config.batch_size or preset_config("default", base.family.presets).train_batch_size
        wanted = [method for row in self.methods for method in row]
        return sweep(
            base, negative, tuned, self.condition, wanted, config.seed, config.alpha, config.num_inference_steps, batch_size
        )

    def save_sheet(self, path: Path) -> None:
        """Save all samples as one picture or one video."""
        collected: dict[Method, list[Tensor]] = {}
        for method, _, batch in self.samples():
            collected.setdefault(method, []).append(batch)
        config, base, vae = self.config, self.base, open_vae(self.base)
        latents = {method: torch.cat(batches) for method, batches in collected.items()}
        labels = self.prompts if any(self.prompts) else []
        settings = self.settings() | {"prompts": self.prompts}
        plain, guided = self.methods[0][:2]
        share = f", alpha = {config.alpha:g}" if config.positive else ""
        negatives = [f"negative, beta = {beta:g}{share}" for beta in config.beta]
        titles = [title(self._plain_name, plain.guidance_scale), title(negatives[0], guided.guidance_scale)]
        if path.suffix in VIDEOS:
            videos = [[to_bytes(frames) for frames in decode_frames(base, latents[each], vae)] for each in (plain, guided)]
            save_video(path, titles, videos, config.fps or FPS, labels, png_text(settings)["selfnpo"])
            return
        images = {method: decode_samples(base, samples, vae) for method, samples in latents.items()}
        frames = len(images[plain]) // len(self.prompts)
        caption = f"negative model: {config.negative} | images in the same position start from the same noise"
        text = png_text(settings)
        if frames > 1:
            caption += f" | {frames} frames from each video"
        if config.is_sweep:
            count = len(self.prompts)
            columns = frames if frames > 1 else 5 if count > 9 else math.ceil(math.sqrt(count))
            names = [f"guidance_scale\n{scale:g}" for scale in self.scales]
            cells = [[images[method] for method in row] for row in self.methods]
            head = titles[0] if plain.guidance_scale == 1 else self._plain_name
            save_table(path, cells, names, [head, *negatives], columns, caption, labels, text)
        else:
            columns = frames if frames > 1 else min(self.wide, len(self.prompts))
            panels = [(name, images[method]) for name, method in zip(titles, (plain, guided), strict=True)]
            save_comparison(path, panels, columns, caption, labels, text)

    def save_folder(self, folder: SampleFolder) -> None:
        """Save one file per sample, batch by batch."""
        names = folder_names((method for row in self.methods for method in row), self.config.positive is not None)
        folder.prepare(names.values(), self.prompts, self.settings())
        vae = open_vae(self.base)
        for method, numbers, latents in self.samples():
            for number, frames in zip(numbers, decode_frames(self.base, latents, vae), strict=True):
                settings = {"prompt": self.prompts[number]} | self.settings(method)
                folder.save(names[method], number, frames, settings, self.config.fps or FPS)
        folders = ", ".join(f"{name}/" for name in names.values())
        print(f"written to {folder.folder}: {len(self.prompts)} samples in each of {folders}")

    @property
    def _plain_name(self) -> str:
        name = plain_guidance(self.base, self.condition, self.scales[0])[1]
        return "the positive itself" if self.config.positive and self.methods[0][0].guidance_scale == 1 else name

    def settings(self, method: Method | None = None) -> dict[str, Any]:
        """The settings of the samples as JSON types, for one method or for all."""
        config, base = self.config, self.base
        named = {"pretrained_model_name_or_path": config.pretrained_model_name_or_path}
        named |= changed(replace(config, local_files_only=False), ModelOptions, SampleOptions)
        named |= {"positive": str(config.positive)} if config.positive else {}
        negative = {"negative": str(config.negative), "alpha": config.alpha, "beta": config.beta}
        if method is not None and method.beta is None:
            negative = {}
        elif method is not None:
            negative["beta"] = method.beta
        return named | negative | {
            "guidance_scale": self.scales if method is None else method.guidance_scale,
            "num_inference_steps": config.num_inference_steps,
            "seed": config.seed,
            "dtype": str(base.dtype).removeprefix("torch."),
        }  # fmt: skip
