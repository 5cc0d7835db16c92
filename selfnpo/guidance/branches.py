"""What the two ways of keeping two branches in one denoiser have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from selfnpo.errors import UserError

Part = Literal["none", "first", "second", "all"]
"""What the negative answers of a batch: nothing, one of its halves, or all of it."""
Forward = Callable[..., Any]


class Branches(ABC):
    """The weights of a positive and a negative branch beside a denoiser."""

    @abstractmethod
    def attach(self) -> None:
        """Change the denoiser's layers where that is needed; it computes as before until `evaluate` is called."""

    @abstractmethod
    def detach(self) -> None:
        """Leave the layers as they were."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """What lies beside the denoiser, to be moved along with it."""

    @abstractmethod
    def prepare(self, sample: Tensor) -> None:
        """Before a run: follow what has happened to the denoiser since. `sample` lies where the run computes.

        Raises:
            UserError: something has happened under which the branches would not be what they should be.
        """

    @abstractmethod
    def evaluate(self, forward: Forward, arguments: dict[str, Any], part: Part) -> Any:
        """The denoiser's output, its `part` by the negative and the rest by the positive.

        Args:
            forward: of the denoiser.
            arguments: of `forward`, the sample first.
        """


def base_layers(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of a denoiser as it was built, without what peft has put around its layers."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    yield path, module
    for name, child in module.named_children():
        yield from base_layers(child, f"{path}.{name}" if path else name)


def base_weights(denoiser: nn.Module) -> dict[str, Tensor]:
    """Parameters by their names in the denoiser as it was built, also where accelerate keeps them on the host."""
    found = {}
    for path, layer in base_layers(denoiser):
        hook = offload_hook(layer)
        for name, parameter in layer.named_parameters(recurse=False):
            found[f"{path}.{name}" if path else name] = hook.weights_map[name] if hook else parameter
    return found


def offload_hook(layer: nn.Module) -> Any:
    """accelerate's hook that brings a layer's weights for every call, or None."""
    hook = getattr(layer, "_hf_hook", None)
    return next((each for each in getattr(hook, "hooks", (hook,)) if getattr(each, "offload", False)), None)


def check_projections(denoiser: nn.Module) -> None:
    """Raises: UserError where diffusers computes with joined copies of layers, past the layers themselves."""
    for path, layer in denoiser.named_modules():
        processor = type(getattr(layer, "processor", None)).__name__
        # Attention of old does not tell by its flag that it is no longer fused.
        if processor.startswith("Fused") or (
            getattr(layer, "fused_projections", False) and hasattr(layer, "unfuse_projections")
        ):
            raise UserError(f"the projections of {path} are fused, past the negative; call pipe.unfuse_qkv_projections()")
