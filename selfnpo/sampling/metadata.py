"""Metadata on how a file was made: JSON, and the line that image viewers and ComfyUI read."""

import json
from collections.abc import Mapping
from typing import Any


def png_text(settings: Mapping[str, Any]) -> dict[str, str]:
    """For a contact sheet: its settings as JSON."""
    return {"Software": "selfnpo", "selfnpo": json.dumps(settings, ensure_ascii=False)}


def image_text(settings: Mapping[str, Any]) -> dict[str, str]:
    """For a single image: its settings as JSON and in AUTOMATIC1111's format, which ComfyUI and Civitai read too."""
    words = {
        "Steps": settings["num_inference_steps"],
        "Sampler": "DDIM",
        "CFG scale": settings["guidance_scale"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": settings["pretrained_model_name_or_path"],
        "Image": settings["image"],
    }
    if "beta" in settings:
        words |= {"Negative model": settings["negative"], "Negative beta": settings["beta"]}
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in words.items())
    return {"parameters": f"{settings['prompt']}\n{line}"} | png_text(settings)


def _quoted(value: Any) -> str:
    """Quote text that contains separators, as AUTOMATIC1111 does."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(each in text for each in ",:\n") else text
