"""Find a model and its small files, in a local folder or on the hub. Formats that can run code are refused."""

import difflib
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from selfnpo.errors import UserError, first_line
from selfnpo.options import DEMO, ModelOptions
from selfnpo.progress import lasting

SINGLE_FILE = ".safetensors"
EXPECTED = f"expected a diffusers folder, a {SINGLE_FILE} file or a Hugging Face id"
UNSAFE = (".ckpt", ".pt", ".pth", ".bin")


def find(origin: str, filename: str, options: ModelOptions) -> Path | None:
    """Path of a small file in a folder or hub repository; None if the origin exists but has no such file."""
    folder = Path(origin)
    if folder.is_dir():
        path = folder / filename
        if path.is_file():
            return path
        if (folder / "negative").is_dir() and not any(
            (folder / name).is_file() for name in ("config.json", "model_index.json")
        ):
            raise UserError(f"{origin} is the folder of a training run; did you mean {folder / 'negative'}?")
        return None
    if folder.exists():
        raise UserError(f"{origin} is not a {SINGLE_FILE} file; {EXPECTED}")
    try:
        with lasting(f"looking for {origin} on the hub"):
            return Path(
                hf_hub_download(origin, filename, revision=options.revision, local_files_only=options.local_files_only)
            )
    except LocalEntryNotFoundError as error:
        if offline(options) and _cached(origin):
            return None
        raise unreachable(origin, error) from error
    except EntryNotFoundError:
        return None
    except HFValidationError:  # its text is about names on the hub, but this is a path
        raise UserError(f"{origin} does not exist; {EXPECTED}") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise unreachable(origin, error) from error


def check_exists(name: str, options: ModelOptions) -> None:
    """Raise a UserError for a model that is neither local nor on the hub."""
    refuse_unsafe(name)
    if name.endswith(SINGLE_FILE):
        if not Path(name).is_file():
            raise UserError(f"{name} does not exist; expected a {SINGLE_FILE} file, a folder or a Hugging Face id")
        return
    path = Path(name)
    if name == DEMO and not path.exists():
        raise UserError(f"{name} is the embedded model, which only --pretrained_model_name_or_path accepts; {EXPECTED}")
    if not path.exists() and path.parent.name and path.parent.is_dir():
        similar = difflib.get_close_matches(path.name, [each.name for each in path.parent.iterdir()], n=1)
        if similar:
            raise UserError(f"{name} was not found locally or on the hub; did you mean {path.parent / similar[0]}?")
    find(name, "config.json", options)


def offline(options: ModelOptions) -> bool:
    return options.local_files_only or constants.HF_HUB_OFFLINE


def _cached(origin: str) -> bool:
    """Whether the hub's cache contains any part of a repository."""
    return (Path(constants.HF_HUB_CACHE) / f"models--{origin.replace('/', '--')}" / "snapshots").is_dir()


def unreachable(origin: str, error: Exception) -> UserError:
    return UserError(f"{origin} was not found locally or on the hub; {EXPECTED} ({first_line(error)})")


@cache
def recognise(file: Path) -> str:
    """The hub id with the configuration for a single file, as diffusers recognises it from the tensors' names."""
    if not file.is_file():
        raise UserError(f"{file} does not exist; expected a single {SINGLE_FILE} file")
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

    try:
        return fetch_diffusers_config(load_single_file_checkpoint(str(file)))["pretrained_model_name_or_path"]
    except Exception as error:  # diffusers raises many types
        raise UserError(
            f"{file} was not recognised as a diffusion model; pass a diffusers folder with its configuration as "
            f"--single_file_config ({first_line(error)})"
        ) from error


def refuse_unsafe(name: str) -> None:
    if name.endswith(UNSAFE):
        folder = Path(name).with_suffix("")
        raise UserError(
            f'{name} is in a format that can run code when it is opened; convert it once: python -c "from diffusers import '
            f"StableDiffusionPipeline as P; P.from_single_file('{name}').save_pretrained('{folder}')\" and use {folder}"
        )


def weight_variants(origin: str, subfolder: str, options: ModelOptions) -> set[str | None]:
    """The variants that exist of a model part in safetensors; None stands for weights without a variant."""
    return variants_of(_files(origin, subfolder, options))


def variants_of(names: list[str]) -> set[str | None]:
    """fp16 for diffusion_pytorch_model.fp16-00001-of-00002.safetensors, None for diffusion_pytorch_model.safetensors."""
    words = [name.removesuffix(SINGLE_FILE).split(".") for name in names if name.endswith(SINGLE_FILE)]
    return {each[1].split("-")[0] if len(each) > 1 else None for each in words}


def why_not_loaded(origin: str, subfolder: str, options: ModelOptions, converter: str) -> str | None:
    """What is wrong with the files of a part that could not be loaded, and how to fix it; None if the cause is another.

    Args:
        converter: the diffusers class that opens `origin` and saves it as safetensors.
    """
    names, where = _files(origin, subfolder, options), f"{origin}/{subfolder}".rstrip("/")
    found = variants_of(names)
    if found and options.variant not in found:
        wanted = "without a variant" if options.variant is None else f"for the variant {options.variant}"
        fix = "leave --variant out" if None in found else f"pass --variant {min(found)}"
        return f"{where} contains no weights {wanted}; {fix}"
    if not found and any(name.endswith(UNSAFE) for name in names):
        part = f", subfolder='{subfolder}'" if subfolder and converter != "DiffusionPipeline" else ""
        folder = f"{origin if Path(origin).is_dir() else Path(origin).name}-safetensors"
        return (
            f"{where} contains weights in a format that can run code when it is opened; convert them once: "
            f"python -c \"from diffusers import {converter} as C; C.from_pretrained('{origin}'{part})"
            f".save_pretrained('{folder}')\" and use {folder}"
        )
    return None


def _files(origin: str, subfolder: str, options: ModelOptions) -> list[str]:
    """Names of the files in a model part, local or on the hub; if the hub cannot be reached, those in its cache."""
    folder = Path(origin) / subfolder
    if not Path(origin).is_dir():
        if not offline(options):
            with suppress(HfHubHTTPError, HFValidationError, OSError, ValueError):
                paths = map(PurePosixPath, HfApi().list_repo_files(origin, revision=options.revision))
                return [path.name for path in paths if path.parent == PurePosixPath(subfolder)]
        config = find(origin, f"{subfolder}/config.json".lstrip("/"), options)
        folder = folder if config is None else config.parent
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []
