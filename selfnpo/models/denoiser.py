"""Load a single denoiser: without weights, from disk or the hub, or as a replacement for another one."""

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from torch import nn

from selfnpo.errors import UserError, first_line
from selfnpo.models.family import Config
from selfnpo.models.foreign import silent
from selfnpo.models.origin import SINGLE_FILE, find, refuse_unsafe, variants_of, weight_variants, why_not_loaded
from selfnpo.options import ModelOptions
from selfnpo.progress import lasting


def empty_denoiser(kind: type[ModelMixin], config: Config) -> ModelMixin:
    """A denoiser without weights, on the meta device."""
    with init_empty_weights():  # torch.device("meta") can stop working after torch.compile was used
        model = kind.from_config(config)
    return nn.Module.to(model, "meta")


def load_denoiser(
    kind: type[ModelMixin], origin: str | Path, subfolder: str, dtype: torch.dtype, options: ModelOptions, layout: str
) -> ModelMixin:
    """Load a denoiser on the CPU.

    Args:
        origin: a diffusers folder or hub id that contains the denoiser in `subfolder`, or the path of a single file.
        layout: folder or id of the base; its `subfolder` has the configuration for a single file.

    Raises:
        UserError: weights are missing, corrupt or in an unsafe format.
    """
    try:
        with silent(), lasting(f"loading {'/'.join(filter(None, (str(origin), subfolder)))}"):
            if isinstance(origin, Path):
                info, model = {}, _from_single_file(kind, str(origin), subfolder, dtype, options, layout)
            else:
                model, info = kind.from_pretrained(
                    origin, subfolder=subfolder, revision=options.revision, variant=options.variant, torch_dtype=dtype,
                    use_safetensors=True, local_files_only=options.local_files_only, output_loading_info=True,
                    low_cpu_mem_usage=False,
                )  # fmt: skip
    except Exception as error:  # diffusers raises many kinds, also from the parsers beneath it
        whole = "DiffusionPipeline" if origin == layout else kind.__name__
        why = None
        if isinstance(origin, str):
            check_headers(Path(origin) / subfolder, options.variant)
            why = why_not_loaded(origin, subfolder, options, whole)
        told = f"{origin} could not be loaded as a {kind.__name__} from safetensors: {reason(error)}"
        raise UserError(why or told) from error
    check_complete(model, str(origin))
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            raise UserError(f"{origin} does not fit its config.json: {problem.replace('_', ' ')} such as {info[problem][0]}")
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise UserError(f"{origin} contains weights that are inf or NaN; restore them from an intact copy")
    return model.eval().requires_grad_(False)


def _from_single_file(
    kind: type[ModelMixin],
    file: str | dict[str, torch.Tensor],
    subfolder: str,
    dtype: torch.dtype,
    options: ModelOptions,
    layout: str,
) -> ModelMixin:
    """Load a denoiser from a file, or from a dictionary of its tensors."""
    return kind.from_single_file(
        file, config=layout, subfolder=subfolder, torch_dtype=dtype, local_files_only=options.local_files_only
    )


def load_replacement(
    kind: type[ModelMixin],
    name: str,
    component: str,
    expected: Mapping[str, torch.Size],
    dtype: torch.dtype,
    options: ModelOptions,
    layout: str,
) -> ModelMixin:
    """Load another denoiser with the base's architecture: from its own folder, from a pipeline, or from a file.

    Args:
        component: name of the denoiser in a pipeline.
        expected: shapes of the base's weights.

    Raises:
        UserError: it cannot be loaded or has another architecture.
    """
    origin, subfolder, options = _locate(kind, name, component, options)
    model = load_denoiser(kind, origin, subfolder, dtype, options, layout)
    check_same_architecture(name, expected, shapes_of(model))
    return model


def check_replacement(
    kind: type[ModelMixin],
    class_names: Collection[str],
    name: str,
    component: str,
    expected: Mapping[str, torch.Size],
    options: ModelOptions,
    layout: str,
) -> None:
    """Raise the errors of `load_replacement` that configurations and the headers of local files reveal.

    Args:
        class_names: names of `kind` in configurations.
    """
    origin, subfolder, options = _locate(kind, name, component, options)
    if isinstance(origin, Path):
        checkpoint = _headers(origin)  # a single file has no configuration of its own
        try:
            model = _from_single_file(kind, checkpoint, subfolder, torch.float32, options, layout)
        except Exception as error:  # diffusers raises many types
            raise UserError(
                f"{name} could not be loaded as a {kind.__name__} with the base's architecture: {reason(error)}"
            ) from error
        check_complete(model, name)
    else:
        where = f"{subfolder}/config.json".lstrip("/")
        try:
            config = json.loads(find(name, where, options).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{where} of {name} could not be read: {first_line(error)}") from error
        if config.get("_class_name") not in class_names:
            raise UserError(f"{name} is of class {config.get('_class_name')}; expected {kind.__name__}, like the base")
        if not weight_variants(name, subfolder, options):
            raise UserError(
                why_not_loaded(name, subfolder, options, kind.__name__)
                or f"{name} contains no weights; expected {kind.__name__} weights in a *{SINGLE_FILE} file next to {where}"
            )
        check_headers(Path(name) / subfolder, options.variant)
        model = empty_denoiser(kind, config)
    check_same_architecture(name, expected, shapes_of(model))


def _locate(
    kind: type[ModelMixin], name: str, component: str, options: ModelOptions
) -> tuple[str | Path, str, ModelOptions]:
    """The origin of another denoiser (a file, folder or id), its subfolder there, and the options to load it with."""
    refuse_unsafe(name)
    options = replace(options, revision=None)  # the revision belongs to the base
    if name.endswith(SINGLE_FILE):
        check_single_file(kind, Path(name))
        return Path(name), component, options
    subfolder = ""
    if find(name, "config.json", options) is None:
        subfolder = component
        if find(name, f"{subfolder}/config.json", options) is None:
            raise UserError(
                f"{name} contains neither config.json nor {subfolder}/config.json; expected a {kind.__name__} "
                "(config.json and *.safetensors)"
            )
    if options.variant and options.variant not in weight_variants(name, subfolder, options):
        options = replace(options, variant=None)
    return name, subfolder, options


def check_headers(folder: Path, variant: str | None) -> None:
    """Raise a UserError that names a damaged safetensors file; diffusers' own message does not."""
    for file in folder.glob(f"*{SINGLE_FILE}"):
        if variants_of([file.name]) == {variant}:
            _headers(file)


def _headers(file: Path) -> dict[str, torch.Tensor]:
    """Tensors with the shapes in a safetensors file; they use no memory."""
    try:
        with safe_open(file, "pt") as opened:
            keys = opened.keys()
            return {key: torch.zeros(()).expand(opened.get_slice(key).get_shape()) for key in keys}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} could not be read as safetensors: {first_line(error)}") from error


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes of the weights, by name."""
    return {name: weight.shape for name, weight in model.named_parameters()}


def check_same_architecture(name: str, expected: Mapping[str, torch.Size], got: Mapping[str, torch.Size]) -> None:
    """Raise a UserError if a model's weights differ in shape from its base's; it names the first that does."""
    for key in sorted(expected.keys() | got.keys()):
        if expected.get(key) != got.get(key):
            raise UserError(
                f"{name} has a different architecture than the base: {key} is {_shape(got.get(key))}, "
                f"expected {_shape(expected.get(key))}"
            )


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))


def check_single_file(kind: type[ModelMixin], file: Path) -> None:
    if not hasattr(kind, "from_single_file"):
        raise UserError(
            f"{file} is a single file, but diffusers cannot load a {kind.__name__} from one; use a diffusers folder"
        )


def check_complete(model: nn.Module, origin: str) -> None:
    """Raise a UserError if weights were missing in a single file; diffusers silently leaves them without values."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UserError(f"{origin} could not be loaded: {name} is missing; expected a complete checkpoint")


def reason(error: Exception) -> str:
    """Say what diffusers' error means. For weights missing in a single file, its own message is misleading."""
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing; expected a complete checkpoint with the base's architecture"
    if "meta tensor" in str(error):
        return "weights are missing; expected a complete checkpoint"
    return first_line(error).partition(". If you want")[0]  # the rest is advice for callers of diffusers
