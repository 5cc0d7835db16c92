"""Sample grids of a run: plain guidance next to guidance away from the student, from the same noise."""

from pathlib import Path

import torch

from selfnpo.sampling.ddim import ddim_sample, plain_guidance, start_noise, title
from selfnpo.sampling.decode import decode_samples
from selfnpo.sampling.metadata import png_text
from selfnpo.sampling.picture import save_comparison
from selfnpo.training.state import TrainState


def save_grid(path: Path, state: TrainState) -> Path:
    """Write a PNG of `num_validation_images` samples per method, cycling through the validation prompts."""
    config, base, count = state.config, state.base, state.config.num_validation_images
    asked = base.asked(len(config.validation_prompt))
    conditions = asked[torch.arange(count) % len(asked)]
    scale = config.validation_guidance_scale or base.family.guidance_scale
    noise = start_noise(base, count, config.seed)
    plain_scale, plain_name = plain_guidance(base, conditions, scale)
    with state.student.positive() as positive:
        samples = [
            ddim_sample(base, noise, conditions, at, negative, positive, config.num_inference_steps, config.train_batch_size)
            for at, negative in ((plain_scale, positive), (scale, state.model))
        ]
    plain, guided = decode_samples(base, torch.cat(samples)).chunk(2)
    panels = [(title(plain_name, plain_scale), plain), (title(f"negative of step {state.step}", scale), guided)]
    path.parent.mkdir(exist_ok=True)
    numbered = len(asked) > 1 and not base.family.takes_prompts
    names = config.validation_prompt or ([str(number) for number in range(len(asked))] if numbered else ())
    labels = [names[number % len(names)] for number in range(count)] if names else ()
    caption = "equal positions start from equal noise"
    if len(plain) > count:
        caption += f" | {len(plain) // count} frames of every video"
    text = png_text({"step": state.step, "seed": config.seed, "guidance_scale": scale, "prompts": labels})
    save_comparison(path, panels, len(plain) // count if len(plain) > count else min(4, count), caption, labels, text)
    return path
