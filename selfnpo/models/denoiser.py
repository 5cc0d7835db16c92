"""A denoiser alone: without weights, from disk or from the hub, or in place of another one."""

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
from selfnpo.models.origin import SINGLE_FILE, find, refuse_unsafe, weight_variants, why_not_loaded
from selfnpo.options import ModelOptions


def empty_denoiser(kind: type[ModelMixin], config: Config) -> ModelMixin:
    """A denoiser without weights, on the meta device."""
    with init_empty_weights():  # torch.device("meta") loses its effect after some uses of torch.compile
        model = kind.from_config(config)
    return nn.Module.to(model, "meta")


def load_denoiser(
    kind: type[ModelMixin], origin: str | Path, subfolder: str, dtype: torch.dtype, options: ModelOptions, layout: str
) -> ModelMixin:
    """A denoiser on the CPU.

    Args:
        origin: a diffusers folder or a hub id, whose `subfolder` holds it, or the path of a single file.
        layout: folder or id of the base, which has the configuration of a single file in `subfolder`.

    Raises:
        UserError: weights are missing, corrupt or in an unsafe format.
    """
    try:
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
        why = why_not_loaded(origin, subfolder, options, whole) if isinstance(origin, str) else None
        told = f"{origin} could not be loaded as a {kind.__name__} in safetensors: {reason(error)}"
        raise UserError(why or told) from error
    check_complete(model, str(origin))
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            raise UserError(f"{origin} does not fit its config.json: {problem.replace('_', ' ')} such as {info[problem][0]}")
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise UserError(f"{origin} holds weights that are inf or NaN; restore them from an intact copy")
    return model.eval().requires_grad_(False)


def _from_single_file(
    kind: type[ModelMixin],
    file: str | dict[str, torch.Tensor],
    subfolder: str,
    dtype: torch.dtype,
    options: ModelOptions,
    layout: str,
) -> ModelMixin:
    """A denoiser from a file, or from what is in it."""
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
    """Another denoiser of the base's architecture: from its own folder, from the pipeline that holds it, or from a file.

    Args:
        component: its name in a pipeline.
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
    """Raise a UserError where `load_replacement` would, as far as configurations and the headers of local files tell.

    Args:
        class_names: what configurations call `kind`.
    """
    origin, subfolder, options = _locate(kind, name, component, options)
    if isinstance(origin, Path):
        checkpoint = _headers(origin)  # a single file's configuration is the base's
        try:
            model = _from_single_file(kind, checkpoint, subfolder, torch.float32, options, layout)
        except Exception as error:  # as above
            raise UserError(
                f"{name} could not be loaded as a {kind.__name__} of the base's architecture: {reason(error)}"
            ) from error
        check_complete(model, name)
    else:
        where = f"{subfolder}/config.json".lstrip("/")
        try:
            config = json.loads(find(name, where, options).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{where} of {name} could not be read: {first_line(error)}") from error
        if config.get("_class_name") not in class_names:
            raise UserError(f"{name} is a {config.get('_class_name')}; expected a {kind.__name__}, as the base is")
        if not weight_variants(name, subfolder, options):
            raise UserError(
                why_not_loaded(name, subfolder, options, kind.__name__)
                or f"{name} holds no weights; expected {kind.__name__} weights in *{SINGLE_FILE} beside {where}"
            )
        for file in (Path(name) / subfolder).glob(f"*{SINGLE_FILE}"):
            _headers(file)
        model = empty_denoiser(kind, config)
    check_same_architecture(name, expected, shapes_of(model))


def _locate(
    kind: type[ModelMixin], name: str, component: str, options: ModelOptions
) -> tuple[str | Path, str, ModelOptions]:
    """Where another denoiser lies: a file, or a folder or id and the part of it; and the options to load it with."""
    refuse_unsafe(name)
    options = replace(options, revision=None)  # which is the base's
    if name.endswith(SINGLE_FILE):
        check_single_file(kind, Path(name))
        return Path(name), component, options
    subfolder = ""
    if find(name, "config.json", options) is None:
        subfolder = component
        if find(name, f"{subfolder}/config.json", options) is None:
            raise UserError(
                f"{name} holds no config.json and no {subfolder}/config.json; expected a {kind.__name__} "
                "(config.json and *.safetensors)"
            )
    if options.variant and options.variant not in weight_variants(name, subfolder, options):
        options = replace(options, variant=None)
    return name, subfolder, options


def _headers(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of the shapes in a safetensors file that take no memory."""
    try:
        with safe_open(file, "pt") as opened:
            keys = opened.keys()
            return {key: torch.zeros(()).expand(opened.get_slice(key).get_shape()) for key in keys}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} could not be read as safetensors: {first_line(error)}") from error


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Of the weights, by their names."""
    return {name: weight.shape for name, weight in model.named_parameters()}


def check_same_architecture(name: str, expected: Mapping[str, torch.Size], got: Mapping[str, torch.Size]) -> None:
    """Raise a UserError that names the first weight, in the order of names, in which a model differs from its base."""
    for key in sorted(expected.keys() | got.keys()):
        if expected.get(key) != got.get(key):
            raise UserError(
                f"{name} has another architecture than the base: {key} is {_shape(got.get(key))}, "
                f"expected {_shape(expected.get(key))}"
            )


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))


def check_single_file(kind: type[ModelMixin], file: Path) -> None:
    if not hasattr(kind, "from_single_file"):
        raise UserError(
            f"{file} is a single file, which diffusers does not read for {kind.__name__}; use a diffusers folder"
        )


def check_complete(model: nn.Module, origin: str) -> None:
    """Single files may lack weights, which diffusers then leaves without values."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UserError(f"{origin} could not be loaded: it holds no {name}; expected a complete checkpoint")


def reason(error: Exception) -> str:
    """What diffusers meant; it fails to move weights of a single file that it did not find, or fails to find them."""
    if isinstance(error, KeyError):
        return f"it holds no {error.args[0]}; expected a complete checkpoint of the base's architecture"
    if "meta tensor" in str(error):
        return "it lacks weights; expected a complete checkpoint"
    return first_line(error).partition(". If you want")[0]  # what follows is for those who call diffusers
