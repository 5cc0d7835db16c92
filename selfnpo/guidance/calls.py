"""Which part of each denoiser call is the negative's. Pipelines do not say; it is inferred from how they call."""

import inspect
import logging
import sys
import weakref
from typing import Any, Literal

from diffusers import DiffusionPipeline, ModelMixin, ModularPipeline
from torch import Tensor

from selfnpo.errors import UserError
from selfnpo.guidance.branches import Part

log = logging.getLogger("selfnpo")

Mode = Literal["auto", "alternate"]


class Calls:
    """The calls of one denoiser, in order.

    Args:
        mode: "alternate" if every second call with the same sample is the unconditional one.
        extrapolates: whether every call evaluates both branches, for a pipeline without guidance of its own.
    """

    def __init__(self, denoiser: ModelMixin, mode: Mode, extrapolates: bool):
        self.config, self.mode, self.extrapolates = denoiser.config, mode, extrapolates
        self.signature = inspect.signature(type(denoiser).forward)
        self.answered = 0  # calls in which the negative had a part
        self._run: tuple[Any, ...] = ()
        self._part: Part = "none"
        self._last: Tensor | None = None

    def arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """A call's arguments by name, in the order of the denoiser's signature, so the sample comes first."""
        bound = self.signature.bind(None, *args, **kwargs).arguments
        further = bound.pop("kwargs", {})
        return {name: value for name, value in bound.items() if name != "self"} | further

    def starts_run(self, arguments: dict[str, Any]) -> bool:
        """Whether this call begins a new run of the pipeline.

        All steps of a run share one timesteps tensor; when no pipeline is running, the condition takes its place.

        Raises:
            UserError: the pipeline runs without guidance.
        """
        sample, running = _sample(arguments), _running_pipeline()
        constant = getattr(getattr(running, "scheduler", None), "timesteps", None)
        if constant is None:
            constant = arguments.get("encoder_hidden_states", arguments.get("class_labels"))
        guides = getattr(running, "do_classifier_free_guidance", None)
        run = running, guides, sample.shape, sample.device, sample.dtype
        if self._run and self._run[1:] == run and self._run[0]() is constant is not None:
            return False
        self._check_guided(running, guides)
        # Compares values, which makes the host wait: done once per run, not in every step.
        self._part = "first" if self.extrapolates else _doubled(arguments, self.config)
        self._run = (lambda: None) if constant is None else weakref.ref(constant), *run
        return True

    def part(self, arguments: dict[str, Any], context: str | None) -> Part:
        """The negative's part of this call, which belongs to the run that `starts_run` last saw.

        Args:
            context: name of diffusers' cache context, if the pipeline has set one.
        """
        guider, sample = getattr(self._run[1], "guider", None), _sample(arguments)
        if guider is not None:
            part = "none" if guider.is_conditional else "all"
        elif context in ("cond", "uncond"):
            part = "none" if context == "cond" else "all"
        elif self.mode == "alternate":
            part = "all" if sample is self._last else "none"
            self._last = None if part == "all" else sample
        else:
            part = self._part
        self.answered += part != "none"
        return part

    def _check_guided(self, running: Any, guides: bool | None) -> None:
        """Refuse a run without guidance. A callback may still turn guidance off in the middle of a run."""
        scale = getattr(running, "guidance_scale", None)  # some pipelines change it later on
        distilled = running is not None and "true_cfg_scale" in inspect.signature(type(running).__call__).parameters
        if guides is None and isinstance(scale, (int, float)) and not distilled:  # there it is an input of the model
            guides = scale > 1
        if guides is False and not self.answered:
            raise UserError(f"guidance_scale is {scale}: the negative would do nothing; pass the pipeline a value above 1")
        if guides is False:
            log.warning("guidance_scale is %s: the negative has no effect from here on", scale)


def _sample(arguments: dict[str, Any]) -> Tensor:
    return next(iter(arguments.values()))


def _running_pipeline() -> DiffusionPipeline | ModularPipeline | None:
    """The pipeline that makes this call. Several may share a denoiser, each with guidance settings of its own."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            owner = frame.f_locals.get("self")
            if isinstance(owner, (DiffusionPipeline, ModularPipeline)):
                return owner
        frame = frame.f_back
    return None


def _doubled(arguments: dict[str, Any], config: Any) -> Part:
    """The negative's half of a classifier-free guidance batch, or "none" if this is not such a batch."""
    sample, labels, null = _sample(arguments), arguments.get("class_labels"), getattr(config, "num_embeds_ada_norm", None)
    half = len(sample) // 2
    if len(sample) % 2 or not half or not sample[:half].equal(sample[half:]):
        return "none"
    if labels is None or null is None:
        return "first"
    first, second = (bool((part == null).all()) for part in (labels[:half], labels[half:]))
    return "none" if first == second else "first" if first else "second"
