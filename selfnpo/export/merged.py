"""theta + alpha eta + beta delta, or theta - k delta, written as one model.

Weights from folders and hub ids are read, mixed and written one tensor at a time. Models that diffusers must convert are
loaded completely.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from selfnpo.errors import UserError
from selfnpo.files import DTYPES, committed_folder, tensors_header
from selfnpo.mixing import mixed
from selfnpo.models import ModelOptions, Source
from selfnpo.models.lora.read import is_lora, read_offsets
from selfnpo.models.lora.write import model_spec
from selfnpo.models.origin import SINGLE_FILE, find
from selfnpo.progress import progress

MAX_SHARD_SIZE = "10GB"  # diffusers' default
AS_STORED = {"F32", "F16", "BF16"}  # dtypes of weights that can be read directly

Read = Callable[[str], Tensor]  # name -> weight in float32
ReadTuned = Callable[[str, Tensor], Tensor]  # name, base's weight -> weight in float32


@torch.no_grad()
def merge(
    source: Source,
    negative: str,
    folder: Path,
    *,
    positive: str | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    dtype: torch.dtype | None = None,
) -> torch.dtype:
    """Write theta + alpha eta + beta delta as a diffusers folder for the denoiser, replacing `folder`.

    Args:
        source: theta.
        negative: theta + delta, full weights or a LoRA for theta: a folder, a hub id or a file.
        positive: theta + eta, likewise.
        beta: -k gives theta - k delta.
        dtype: dtype of the result; by default that of the base's files, or float32 if they mix dtypes or must be converted.

    Returns:
        The dtype of the result.

    Raises:
        UserError: a model cannot be read, has a different architecture or weights that are inf or NaN, or the result
            overflows its dtype. `folder` is then left unchanged.
    """
    empty, base = source.empty_denoiser(), source.options.pretrained_model_name_or_path
    shapes = {key: tensor.shape for key, tensor in empty.state_dict().items()}
    theta, base_dtype = _base(source, shapes)
    changed = _tuned(source, negative, shapes)
    tuned = None if positive is None else _tuned(source, positive, shapes)
    dtype = dtype or base_dtype
    state = {key: tensor.to(dtype) for key, tensor in empty.state_dict().items()}  # without values, only for sizes
    split = split_torch_state_dict_into_shards(
        state, filename_pattern=weights_file("{suffix}"), max_shard_size=MAX_SHARD_SIZE
    )
    names = ", ".join(filter(None, (base, negative, positive)))
    title = f"{formula(alpha, beta, positive is not None)} of {names}"
    metadata = {"format": "pt"} | model_spec(source.family.architecture, title, merged_from=names)

    def result(key: str) -> Tensor:
        original = _intact(theta(key), key, base)
        other = None if tuned is None else _intact(tuned(key, original), key, positive)
        weight = mixed(original, _intact(changed(key, original), key, negative), other, alpha, beta).to(dtype)
        if not _is_finite(weight):
            raise UserError(f"the result's {key} is too large for {dtype_name(dtype)}; pass --dtype bfloat16 or float32")
        bar.update()
        return weight

    with (
        committed_folder(folder.resolve()) as partial,
        progress(total=len(state), desc="merge", unit="tensor") as bar,
    ):
        empty.save_config(partial)
        for filename, keys in split.filename_to_tensors.items():
            _write(partial / filename, {key: state[key] for key in keys}, metadata, result)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (partial / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return dtype


def formula(alpha: float, beta: float, has_positive: bool) -> str:
    """The formula of the result, such as theta + 1 eta + 0.7 delta."""
    shares = [(alpha, "eta")] * has_positive + [(beta, "delta")]
    return "theta" + "".join(f" {'-' if share < 0 else '+'} {abs(share):g} {name}" for share, name in shares)


def _base(source: Source, shapes: Mapping[str, torch.Size]) -> tuple[Read, torch.dtype]:
    """A reader of the base's weights, and the dtype in which they are stored."""
    options = source.options
    if source.file is None and options.denoiser_name_or_path is None and options.lora_name_or_path is None:
        files, dtypes = _stored(source.layout, source.subfolder, options, shapes)
        if dtypes <= AS_STORED and files:
            return _reader(files), DTYPES[dtypes.pop()] if len(dtypes) == 1 else torch.float32
    return source.denoiser(torch.float32).state_dict().__getitem__, torch.float32


def _tuned(source: Source, name: str, shapes: Mapping[str, torch.Size]) -> ReadTuned:
    """A reader of a fine-tune's weights: full weights, or the base's weights plus a LoRA's offsets."""
    options = replace(source.options, revision=None)  # the revision belongs to the base
    if is_lora(name, options):
        family, options = source.family, replace(options, lora_name_or_path=name)
        offsets = read_offsets(source.empty_denoiser(), family.pipeline_class, family.component, options)
        by_key = {f"{path}.weight": offset for path, offset in offsets.items()}
        return lambda key, theta: theta + by_key[key].weight() if key in by_key else theta
    files: dict[str, Path] = {}
    if not name.endswith(SINGLE_FILE):
        subfolder = "" if find(name, "config.json", options) else source.component
        for variant in dict.fromkeys((options.variant, None)):  # the base's variant, if it exists
            files = files or _stored(name, subfolder, replace(options, variant=variant), shapes)[0]
    read = _reader(files) if files else source.replacement(name, torch.float32).state_dict().__getitem__
    return lambda key, _: read(key)


def _stored(
    origin: str, subfolder: str, options: ModelOptions, shapes: Mapping[str, torch.Size]
) -> tuple[dict[str, Path], set[str]]:
    """The file of every weight, and their dtypes. Returns no files unless they contain exactly the weights in `shapes`.

    Diffusers loads or refuses everything else, such as files from its older versions.
    """
    found: dict[str, Path] = {}
    got, dtypes = {}, set()
    try:
        for path in _weight_files(origin, subfolder, options):
            with safe_open(path, "pt") as file:
                keys = file.keys()
                for key in keys:
                    part = file.get_slice(key)
                    found[key], got[key] = path, torch.Size(part.get_shape())
                    dtypes.add(part.get_dtype())
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return {}, set()
    return (found, dtypes) if got == shapes else ({}, set())


def _weight_files(origin: str, subfolder: str, options: ModelOptions) -> list[Path]:
    """The existing safetensors files of a denoiser."""
    where, variant = f"{subfolder}/".lstrip("/"), f".{options.variant}" if options.variant else ""
    index = find(origin, where + SAFE_WEIGHTS_INDEX_NAME.removesuffix(".json") + f"{variant}.json", options)
    names = {weights_file(variant)} if index is None else set(json.loads(index.read_text())["weight_map"].values())
    return [path for name in sorted(names) if (path := find(origin, where + name, options))]


def weights_file(suffix: str) -> str:
    """Such as diffusion_pytorch_model.fp16.safetensors for .fp16."""
    return f"{SAFETENSORS_WEIGHTS_NAME.removesuffix(SINGLE_FILE)}{suffix}{SINGLE_FILE}"


def _reader(files: Mapping[str, Path]) -> Read:
    """A reader that maps a file into memory only while one of its tensors is in use."""

    def read(key: str) -> Tensor:
        with safe_open(files[key], "pt") as file:
            return file.get_tensor(key).float()

    return read


def _is_finite(weight: Tensor) -> bool:
    return all(map(torch.isfinite, weight.aminmax()))  # finds NaN too, without a copy


def _intact(weight: Tensor, key: str, name: str) -> Tensor:
    if not _is_finite(weight):
        raise UserError(f"{name} contains weights that are inf or NaN, such as {key}; restore them from an intact copy")
    return weight


def _write(path: Path, like: Mapping[str, Tensor], metadata: dict[str, str], result: Read) -> None:
    """Write a safetensors file, one tensor at a time.

    Args:
        like: shapes and dtype, in the order of the data.
        result: returns a tensor when it is needed.
    """
    with path.open("wb") as file:
        file.write(tensors_header(like, metadata))
        for key in like:
            file.write(result(key).flatten().view(torch.uint8).numpy())


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
