"""What the two ways of running two branches in one denoiser have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from selfnpo.errors import UserError

Part = Literal["none", "first", "second", "all"]
"""The part of a batch that the negative computes: nothing, one half, or all of it."""
Forward = Callable[..., Any]


class Branches(ABC):
    """The extra weights that turn a denoiser into a positive and a negative branch."""

    @abstractmethod
    def attach(self) -> None:
        """Change the denoiser's layers if needed. Its output stays the same until `evaluate` is called."""

    @abstractmethod
    def detach(self) -> None:
        """Restore the layers."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """The extra weights, which must move together with the denoiser."""

    @abstractmethod
    def prepare(self, sample: Tensor) -> None:
        """Called before each run: adapt to changes of the denoiser. `sample` has the device and dtype of the run.

        Raises:
            UserError: the denoiser has changed in a way that would make the branches wrong.
        """

    @abstractmethod
    def evaluate(self, forward: Forward, arguments: dict[str, Any], part: Part) -> Any:
        """The denoiser's output. The negative computes `part`, the positive computes the rest.

        Args:
            forward: the denoiser's.
            arguments: arguments of `forward`, the sample first.
        """


def base_layers(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of the denoiser's original layers, without peft's wrappers."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    yield path, module
    for name, child in module.named_children():
        yield from base_layers(child, f"{path}.{name}" if path else name)


def base_weights(denoiser: nn.Module) -> dict[str, Tensor]:
    """Parameters by their names in the original denoiser, including those that accelerate has offloaded to the host."""
    found = {}
    for path, layer in base_layers(denoiser):
        hook = offload_hook(layer)
        for name, parameter in layer.named_parameters(recurse=False):
            found[f"{path}.{name}" if path else name] = hook.weights_map[name] if hook else parameter
    return found


def offload_hook(layer: nn.Module) -> Any:
    """accelerate's hook that loads a layer's offloaded weights for every call, or None."""
    hook = getattr(layer, "_hf_hook", None)
    return next((each for each in getattr(hook, "hooks", (hook,)) if getattr(each, "offload", False)), None)


def check_projections(denoiser: nn.Module) -> None:
    """Raises: UserError if diffusers uses fused copies of layers instead of the layers themselves."""
    for path, layer in denoiser.named_modules():
        processor = type(getattr(layer, "processor", None)).__name__
        # The older Attention class keeps its flag set after unfusing, so its processor decides.
        if processor.startswith("Fused") or (
            getattr(layer, "fused_projections", False) and hasattr(layer, "unfuse_projections")
        ):
            raise UserError(f"the fused projections of {path} bypass the negative; call pipe.unfuse_qkv_projections()")
