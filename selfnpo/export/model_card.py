"""The README.md of a trained negative: its base, how it was trained, the cost, and how to use it."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError

from selfnpo.cli import as_flags
from selfnpo.config import TrainConfig, to_yaml
from selfnpo.errors import UserError
from selfnpo.models import DEMO, Family, ModelOptions, SampleOptions, Source
from selfnpo.models.origin import SINGLE_FILE, find
from selfnpo.options import changed

_USE = """\
## How to use it

Do not sample from this model. It replaces the base in the negative branch of classifier-free guidance, so that samples move
away from it:

    {formula}

You need the Python package `selfnpo`, which also trained it. Install it with `pip install .` in its source folder. The
method is described in the paper [Self-NPO, arXiv 2505.11777](https://arxiv.org/abs/2505.11777).

```
python -m selfnpo.sample {base} --negative {negative} \\
    {prompt}--guidance_scale {scale:g} --num_images 4
```

{diffusers}{comfyui}`--beta` makes it weaker (theta + beta delta). `--positive` and `--alpha` combine it with a fine-tuned
positive model (theta + alpha eta + beta delta). The samples during training used alpha = 1, beta = 1 and
guidance_scale = {scale:g}."""

_IN_DIFFUSERS = """\
Or use it in a diffusers pipeline:

```python
from diffusers import {pipeline}
from selfnpo import guide

pipe = {pipeline}.from_pretrained("{base}")
with guide(pipe, "{negative}"):
    output = pipe("a lighthouse in a storm", guidance_scale={scale:g})
```

"""

_LORA_IN_COMFYUI = """\
In ComfyUI, copy `{file}` to `models/loras` and load it with *Create Hook LoRA (MO)*. Connect these hooks to *Cond Set Props*
after the negative prompt. Do not use *Load LoRA*, which would change both branches.

"""

_MODEL_IN_COMFYUI = """\
In ComfyUI, copy `diffusion_pytorch_model.safetensors` to `models/diffusion_models` and load it with *Load Diffusion Model*.
Connect it to *Dual Model CFG Guider* as the negative model.

"""

_FORMULAS = {  # by the kind of condition
    "prompts": 'eps_negative(x, t, "") + guidance_scale * (eps_base(x, t, prompt) - eps_negative(x, t, ""))',
    "classes": "eps_negative(x, t, no class) + guidance_scale * (eps_base(x, t, class) - eps_negative(x, t, no class))",
    "": "eps_negative(x, t) + guidance_scale * (eps_base(x, t) - eps_negative(x, t))",
}


@dataclass(frozen=True)
class Card:
    """What the card contains in addition to the settings."""

    cost: dict[str, Any]
    status: str
    quality: dict[str, Any] | None = None  # metrics by method and guidance scale, if samples were judged
    picture: str | None = None  # a file next to the card
    lora_file: str | None = None  # for a LoRA: its file for ComfyUI, or else for diffusers


def model_card(config: TrainConfig, source: Source, card: Card) -> str:
    """Markdown, with the metadata that the Hugging Face hub reads."""
    base, family = config.pretrained_model_name_or_path, source.family
    scale = config.validation_guidance_scale or family.guidance_scale
    negative = config.hub_model_id if config.push_to_hub else config.output_dir / "negative"
    licence = _licence(source)
    conditions = "prompts" if family.takes_prompts else "classes" if family.classes(source.config) else ""
    is_pipeline = (config.denoiser_name_or_path, config.lora_name_or_path) == (None, None) and not base.endswith(SINGLE_FILE)
    in_diffusers = _IN_DIFFUSERS.format(pipeline=family.pipeline_name, base=base, negative=negative, scale=scale)
    sections = (
        f"---\n{_metadata(config, source, licence, card.lora_file is not None).to_yaml()}\n---",
        f"# Self-NPO negative for {source.name if source.is_demo else base}",
        f"A negative model for `{base}`, fine-tuned on the model's own truncated rollouts. It uses no reward model, and no "
        "data except those listed in the settings.",
        card.picture and f"![Samples with plain guidance and with this negative, from the same noise]({card.picture})",
        _USE.format(
            formula=_FORMULAS[conditions],
            base=_base(config),
            negative=negative,
            prompt='--prompt "a lighthouse in a storm" ' if family.takes_prompts else "",
            scale=scale,
            diffusers=in_diffusers if family.takes_prompts and is_pipeline else "",
            comfyui=_in_comfyui(family, card.lora_file),
        ),
        f"## Cost\n\nStatus: {card.status}.\n\n" + _table(card.cost),
        "## Metrics\n\n" + (_quality(card.quality) if card.quality else "The samples were not scored."),
        "## Licence\n\n" + _licence_sentence(config, licence),
        f"## Settings\n\n```yaml\n{to_yaml(config)}```\n",
    )
    return "\n\n".join(filter(None, sections))


def _metadata(config: TrainConfig, source: Source, licence: dict[str, str], is_lora: bool) -> ModelCardData:
    names = (config.denoiser_name_or_path, config.pretrained_model_name_or_path)
    hub_ids = [name for name in names if name and name != DEMO and not Path(name).exists()]
    family, relation = source.family, "adapter" if is_lora else "finetune"
    return ModelCardData(
        base_model=hub_ids if len(hub_ids) > 1 else next(iter(hub_ids), None),
        library_name="diffusers",
        pipeline_tag=family.pipeline_tag or None,
        tags=["self-npo", "negative-preference-optimization", "diffusers", family.name, *(["lora"] if is_lora else [])],
        **licence | ({"base_model_relation": relation} if hub_ids else {}),
    )


def _licence(source: Source) -> dict[str, str]:
    """The licence in the base's own card; empty if there is none, or if other weights are part of the base."""
    options = source.options
    if source.file or source.is_demo or options.denoiser_name_or_path or options.lora_name_or_path:
        return {}
    try:
        readme = find(source.layout, "README.md", options)
        values = (readme and metadata_load(readme)) or {}
    except (UserError, OSError, ValueError, YAMLError):
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: values[key] for key in keys if isinstance(values.get(key), str)} if values.get("license") else {}


def _licence_sentence(config: TrainConfig, licence: dict[str, str]) -> str:
    base = config.pretrained_model_name_or_path
    if base == DEMO:
        return "The licence of the package `selfnpo`: this negative was trained from its demo."
    names = ", ".join(f"`{name}`" for name in (base, config.denoiser_name_or_path, config.lora_name_or_path) if name)
    if not licence:
        return f"See the licence of {names}, its base."
    link = f" ({licence['license_link']})" if "license_link" in licence else ""
    return f"The licence of {names}, its base: {licence.get('license_name', licence['license'])}{link}."


def _in_comfyui(family: Family, lora_file: str | None) -> str:
    if not family.base_model_version:
        return ""
    return _LORA_IN_COMFYUI.format(file=lora_file) if lora_file else _MODEL_IN_COMFYUI


def _base(config: TrainConfig) -> str:
    """The flags with which another command uses the same base at the same size."""
    flags = {"pretrained_model_name_or_path": config.pretrained_model_name_or_path}
    return shlex.join(as_flags(flags | changed(config, ModelOptions, SampleOptions)))


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
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(each)}" for name, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
