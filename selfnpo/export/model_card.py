"""The README.md of a trained negative: what it was made from, how, at what cost, and how it is used."""

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from selfnpo.cli import as_flags
from selfnpo.config import TrainConfig, to_yaml
from selfnpo.models import DEMO, Family, ModelOptions, SampleOptions
from selfnpo.models.origin import SINGLE_FILE

_USE = """\
## How to use it

It is no model to sample from: it is what classifier-free guidance steers away from, in place of the base itself,

    eps = (w + 1) eps_base(x, t, prompt) - w eps_negative(x, t, "")

```
python -m selfnpo.sample {base} --negative {negative} \\
    {prompt}--guidance_scale {scale:g} --num_images 4
```

{diffusers}`--beta` weakens it (theta + beta delta), `--positive` and `--alpha` combine it with a fine-tuned positive model
(theta + alpha eta + beta delta), `--guidance_scale` is w + 1; it was shown with alpha = 1, beta = 1,
guidance_scale = {scale:g}."""

_IN_DIFFUSERS = """\
or in a pipeline of diffusers:

```python
from diffusers import {pipeline}
from selfnpo import guide

pipe = {pipeline}.from_pretrained("{base}")
with guide(pipe, "{negative}"):
    output = pipe("a lighthouse in a storm", guidance_scale={scale:g})
```

"""


def model_card(
    config: TrainConfig, family: Family, cost: dict[str, Any], status: str, quality: dict[str, Any] | None
) -> str:
    """Markdown with the metadata that the Hugging Face hub reads.

    Args:
        quality: metrics by method and guidance scale, where samples were judged.
    """
    base = config.pretrained_model_name_or_path
    hub_id = None if Path(base).exists() or base == DEMO else base
    tags = ["self-npo", "negative-preference-optimization", "diffusers", family.name, *(["lora"] if config.rank else [])]
    data = ModelCardData(base_model=hub_id, library_name="diffusers", tags=tags)
    scale = config.validation_guidance_scale or family.guidance_scale
    negative = config.hub_model_id if config.push_to_hub else config.output_dir / "negative"
    is_pipeline = (config.denoiser_name_or_path, config.lora_name_or_path) == (None, None) and not base.endswith(SINGLE_FILE)
    in_diffusers = _IN_DIFFUSERS.format(pipeline=family.pipeline_name, base=base, negative=negative, scale=scale)
    return "\n\n".join(
        (
            f"---\n{data.to_yaml()}\n---",
            f"# Self-NPO negative for {base}",
            f"A negative model for `{base}`, fine-tuned on truncated rollouts of the model itself ([Self-NPO]"
            "(https://arxiv.org/abs/2505.11777)): without data beyond those that the settings name, and without a reward.",
            _USE.format(
                base=_base(config),
                negative=negative,
                prompt='--prompt "a lighthouse in a storm" ' if family.takes_prompts else "",
                scale=scale,
                diffusers=in_diffusers if family.takes_prompts and is_pipeline else "",
            ),
            f"## Cost\n\nEnded: {status}.\n\n" + _table(cost),
            "## Metrics\n\n" + (_quality(quality) if quality else "Its samples were not judged."),
            f"## Settings\n\n```yaml\n{to_yaml(config)}```\n",
        )
    )


def _base(config: TrainConfig) -> str:
    """The flags that name the same base, at the same size, to another command."""
    flags = {"pretrained_model_name_or_path": config.pretrained_model_name_or_path}
    for field in (*fields(ModelOptions), *fields(SampleOptions)):
        if getattr(config, field.name) != field.default:
            flags[field.name] = getattr(config, field.name)
    return shlex.join(as_flags(flags))


def _table(values: dict[str, Any]) -> str:
    rows = [f"| {name.replace('_', ' ')} | {_text(value)} |" for name, value in values.items()]
    return "\n".join(("| what | value |", "| --- | --- |", *rows))


def _quality(quality: dict[str, Any]) -> str:
    rows = [
        f"| {arm} | {scale} | " + ", ".join(f"{name} {_text(value)}" for name, value in replicates[0].items()) + " |"
        for arm, scales in quality.items()
        for scale, replicates in scales.items()
    ]
    return "\n".join(("| negative | guidance_scale | first replicate |", "| --- | --- | --- |", *rows))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
