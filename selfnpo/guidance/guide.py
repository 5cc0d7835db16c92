"""A negative model in an unmodified diffusers pipeline.

    with guide(pipe, "runs/sd15/negative"):
        image = pipe("a lighthouse in a storm").images[0]

The pipeline guides as ever, uncond + guidance_scale (cond - uncond). What changes is who answers the unconditional part: not
the denoiser itself but its negative, so that the result is (w + 1) eps_pos - w eps_neg.
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

DENOISERS = ("unet", "transformer")  # their names in pipelines
REFUSED = {
    "InstructPix2Pix": "guides with three branches (text and image, image, none)",
    "PAG": "guides with perturbed attention, which is a further part of the batch",
    "LEdits": "guides with one branch per edit",
}
EXTRAPOLATION = 2.0  # w + 1 of pipelines without guidance, by default


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
    """Attach a negative model to a pipeline, until the returned context ends or is detached.

    Whole weights cost what plain guidance costs, in two halves of its batch; a LoRA costs its low-rank products besides.
    What the denoiser has been given otherwise (a style LoRA, an IP-Adapter) stays in both branches. The negative sits in the
    denoiser: pipelines that share it, as by `from_pipe`, are guided too.

    Args:
        pipe: a pipeline with a `unet` or a `transformer`, also a modular one, that guides in one batch or in two calls.
            Unconditional ones are extrapolated: their output is (w + 1) positive - w negative.
        negative: theta + delta where the pipeline is theta: a folder, a hub id, a LoRA file, or a denoiser.
        alpha: share of eta in the negative, in [0, 1]; goes with `positive`.
        beta: share of delta in the negative, in [0, 1].
        positive: theta + eta, for the positive branch in place of the pipeline's own denoiser; given as the negative is.
        guidance_scale: of unconditional pipelines, 2 by default; other pipelines take it in their own call.
        mode: "alternate" for pipelines that call the denoiser twice per step, the second time without the prompt, and do not
            tell by diffusers' cache contexts.
        force: allow alpha and beta outside [0, 1].

    Raises:
        UserError: something does not fit; the pipeline is as it was. While attached: a pipeline that runs without guidance,
            where the negative would do nothing. When the context ends: the negative was never used.
    """
    kind = type(pipe).__name__
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not (math.isfinite(value) if force else 0 <= value <= 1):
            raise UserError(f"{name} is {value}; expected a value from 0 to 1 (force=True allows others that are finite)")
    if alpha != 1 and positive is None:
        raise UserError(f"alpha is {alpha}, which is a share of the positive's offset; pass positive= or leave alpha out")
    if mode not in ("auto", "alternate"):
        raise UserError(f"mode is {mode!r}; expected 'auto' or 'alternate'")
    for part, why in REFUSED.items():
        if part in kind:
            raise UserError(f"{kind} {why}; expected a pipeline with a positive and a negative branch")
    component = next((name for name in DENOISERS if isinstance(getattr(pipe, name, None), nn.Module)), None)
    if component is None:
        raise UserError(f"{kind} holds no unet and no transformer; expected a pipeline with a denoiser")
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
    """w + 1 where the pipeline has no guidance of its own."""
    call, forward = (inspect.signature(each).parameters for each in (type(pipe).__call__, type(denoiser).forward))
    if "guidance_scale" in call or "encoder_hidden_states" in forward:
        if guidance_scale is not None:
            raise UserError(f"guidance_scale belongs to the call of {type(pipe).__name__}; pass it there")
        return None
    scale = EXTRAPOLATION if guidance_scale is None else guidance_scale
    if scale <= 1:
        raise UserError(f"guidance_scale is {scale}: the negative would do nothing; pass one above 1")
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
            raise UserError(f"{name} of the {component} is quantised, which the negative's weights are not; use a LoRA")
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
    """A weight of theta + offset, where theta is in float32."""
    if not _is_low_rank(change):
        return change[name].to(theta) if name in change else theta  # an IP-Adapter's weights are in no negative
    offset = change.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
    return theta if offset is None else theta + offset.weight().to(theta)
