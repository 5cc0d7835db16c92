"""A negative model in an unmodified diffusers pipeline.

    with guide(pipe, "runs/sd15/negative"):
        image = pipe("a lighthouse in a storm").images[0]

The pipeline guides as usual: uncond + guidance_scale (cond - uncond). Only the unconditional part changes: the negative
computes it instead of the denoiser itself, so the result is (w + 1) eps_pos - w eps_neg.
"""

import inspect
import math
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin, ModularPipeline
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from selfnpo.errors import UserError
from selfnpo.guidance.attachment import Guidance
from selfnpo.guidance.branches import Branches, base_weights
from selfnpo.guidance.calls import Mode
from selfnpo.guidance.low_rank import LowRank
from selfnpo.guidance.whole_weights import WholeWeights
from selfnpo.mixing import mixed
from selfnpo.models.change import Change, read_change
from selfnpo.models.lora.read import Offset

DENOISERS = ("unet", "transformer")  # names of the denoiser in pipelines
REFUSED = {
    "InstructPix2Pix": "guides with three branches (text and image, image, none)",
    "PAG": "guides with perturbed attention, which adds another part to the batch",
    "LEdits": "guides with one branch per edit",
}
EXTRAPOLATION = 2.0  # default guidance scale for pipelines without guidance


def guide(
    pipe: DiffusionPipeline | ModularPipeline,
    negative: nn.Module | str | Path,
    alpha: float = 1.0,
    beta: float = 1.0,
    positive: nn.Module | str | Path | None = None,
    *,
    guidance_scale: float | None = None,
    mode: Mode = "auto",
    force: bool = False,
) -> Guidance:
    """Attach a negative model to a pipeline, until the returned context ends or its `detach` is called.

    Full weights cost as much as plain guidance: each half of its batch runs with its own weights. A LoRA adds the cost of
    its low-rank products. Anything else loaded into the denoiser (a style LoRA, an IP-Adapter) acts on both branches. The
    negative is attached to the denoiser, so pipelines that share it (made by `from_pipe`) are guided too.

    Args:
        pipe: a pipeline, modular or not, with a `unet` or a `transformer`, that guides in one batch or in two calls. An
            unconditional pipeline is extrapolated: its output becomes negative + guidance_scale * (positive - negative).
        negative: theta + delta, where the pipeline is theta: a folder, a hub id, a LoRA file, or a denoiser.
        alpha: share of eta in the negative, in [0, 1]; needs `positive`.
        beta: share of delta in the negative, in [0, 1].
        positive: theta + eta, which replaces the pipeline's own denoiser in the positive branch; same forms as `negative`.
        guidance_scale: for unconditional pipelines, 2 by default; other pipelines take it in their own call.
        mode: "alternate" for pipelines that call the denoiser twice per step, the second time without the prompt, and do not
            use diffusers' cache contexts.
        force: allow alpha and beta outside [0, 1].

    Raises:
        UserError: something does not fit; the pipeline is unchanged. While attached: the pipeline runs without guidance, so
            the negative would do nothing. When the context ends: the negative was never used.
    """
    kind = type(pipe).__name__
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not (math.isfinite(value) if force else 0 <= value <= 1):
            raise UserError(f"{name} is {value}; expected a value from 0 to 1 (force=True allows any finite value)")
    if alpha != 1 and positive is None:
        raise UserError(f"alpha is {alpha}, but it scales the offset of a positive; pass positive= or leave alpha out")
    if mode not in ("auto", "alternate"):
        raise UserError(f"mode is {mode!r}; expected 'auto' or 'alternate'")
    for part, why in REFUSED.items():
        if part in kind:
            raise UserError(f"{kind} {why}; expected a pipeline with a positive and a negative branch")
    component = next((name for name in DENOISERS if isinstance(getattr(pipe, name, None), nn.Module)), None)
    if component is None:
        raise UserError(f"{kind} has neither a unet nor a transformer; expected a pipeline with a denoiser")
    denoiser = unwrap_module(getattr(pipe, component))
    scale = _extrapolation(pipe, denoiser, guidance_scale)
    branches = _branches(pipe, component, denoiser, negative, positive, alpha, beta)
    name = type(negative).__name__ if isinstance(negative, nn.Module) else negative
    settings = f"alpha {alpha:g}, beta {beta:g}" + ("" if scale is None else f", guidance_scale {scale:g}")
    guidance = Guidance(pipe, component, branches, f"negative {name} ({settings})", scale, mode)
    guidance.attach()
    return guidance


def _extrapolation(
    pipe: DiffusionPipeline | ModularPipeline, denoiser: ModelMixin, guidance_scale: float | None
) -> float | None:
    """The guidance scale if the pipeline has no guidance of its own, else None."""
    call, forward = (inspect.signature(each).parameters for each in (type(pipe).__call__, type(denoiser).forward))
    if "guidance_scale" in call or "encoder_hidden_states" in forward:
        if guidance_scale is not None:
            raise UserError(f"{type(pipe).__name__} takes guidance_scale in its own call; pass it there")
        return None
    scale = EXTRAPOLATION if guidance_scale is None else guidance_scale
    if scale <= 1:
        raise UserError(f"guidance_scale is {scale}: the negative would do nothing; use a value above 1")
    return scale


def _branches(
    pipe: DiffusionPipeline | ModularPipeline,
    component: str,
    denoiser: ModelMixin,
    negative: nn.Module | str | Path,
    positive: nn.Module | str | Path | None,
    alpha: float,
    beta: float,
) -> Branches:
    theta = base_weights(denoiser)
    shapes = {name: weight.shape for name, weight in theta.items()}
    delta = read_change(negative, pipe, component, denoiser, shapes)
    eta = None if positive is None else read_change(positive, pipe, component, denoiser, shapes)
    if _is_low_rank(delta) and (eta is None or _is_low_rank(eta)):
        tuned = {} if eta is None else eta
        return LowRank(denoiser, [(delta, beta), (tuned, alpha)], [(tuned, 1.0)])
    for name, weight in theta.items():
        if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
            raise UserError(f"{name} of the {component} is quantised, but the negative's weights are not; use a LoRA")
    if eta is None and beta == 1:
        return WholeWeights(denoiser, delta, None)
    weights, preferred = {}, None if eta is None else {}
    with torch.no_grad():
        for name, weight in theta.items():
            original = weight.float()
            tuned = None if eta is None else _changed(eta, name, original)
            weights[name] = mixed(original, _changed(delta, name, original), tuned, alpha, beta).to(weight.dtype)
            if preferred is not None:
                preferred[name] = tuned.to(weight.dtype)
    return WholeWeights(denoiser, weights, preferred)


def _is_low_rank(change: Change) -> bool:
    return isinstance(next(iter(change.values())), Offset)


def _changed(change: Change, name: str, theta: Tensor) -> Tensor:
    """One weight of theta + offset. `theta` is in float32."""
    if not _is_low_rank(change):
        return change[name].to(theta) if name in change else theta  # a negative has no IP-Adapter weights
    offset = change.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
    return theta if offset is None else theta + offset.weight().to(theta)
