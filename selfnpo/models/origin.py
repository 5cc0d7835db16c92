"""Which model is meant, and its small files: in a folder here or on the hub. What could run code is refused by name."""

from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from selfnpo.errors import UserError, first_line
from selfnpo.options import ModelOptions

SINGLE_FILE = ".safetensors"
UNSAFE = (".ckpt", ".pt", ".pth", ".bin")


def find(origin: str, filename: str, options: ModelOptions) -> Path | None:
    """A small file of a folder or of a hub id; None where the origin exists and has no such file."""
    folder = Path(origin)
    if folder.is_dir():
        path = folder / filename
        return path if path.is_file() else None
    if folder.exists():
        raise UserError(
            f"{origin} is a file that is no {SINGLE_FILE}; expected a diffusers folder, an id or a {SINGLE_FILE} file"
        )
    try:
        return Path(hf_hub_download(origin, filename, revision=options.revision, local_files_only=options.local_files_only))
    except LocalEntryNotFoundError as error:
        if offline(options) and _cached(origin):
            return None
        raise unreachable(origin, error) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise unreachable(origin, error) from error


def check_exists(name: str, options: ModelOptions) -> None:
    """Raise a UserError for a model that is neither here nor on the hub."""
    refuse_unsafe(name)
    if name.endswith(SINGLE_FILE):
        if not Path(name).is_file():
            raise UserError(f"{name} does not exist; expected a {SINGLE_FILE} file, a folder or a Hugging Face id")
    elif not Path(name).is_file():
        find(name, "config.json", options)


def offline(options: ModelOptions) -> bool:
    return options.local_files_only or constants.HF_HUB_OFFLINE


def _cached(origin: str) -> bool:
    """Whether the hub's cache holds anything of a repository."""
    return (Path(constants.HF_HUB_CACHE) / f"models--{origin.replace('/', '--')}" / "snapshots").is_dir()


def unreachable(origin: str, error: Exception) -> UserError:
    return UserError(
        f"{origin} is no folder here and could not be fetched from the hub; expected 'demo', a diffusers folder, a "
        f"{SINGLE_FILE} file or a Hugging Face id that can be reached ({first_line(error)})"
    )


@cache
def recognise(file: Path) -> str:
    """The hub id whose configuration diffusers gives to a single file, from the names of its tensors."""
    if not file.is_file():
        raise UserError(f"{file} does not exist; expected a single {SINGLE_FILE} file")
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

    try:
        return fetch_diffusers_config(load_single_file_checkpoint(str(file)))["pretrained_model_name_or_path"]
    except Exception as error:  # diffusers raises many kinds
        raise UserError(
            f"{file} could not be recognised as a diffusion model; name a diffusers folder with its configuration in "
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
    """The variants in which a part of a model is there in safetensors; None is the plain weights."""
    return _variants(_files(origin, subfolder, options))


def _variants(names: list[str]) -> set[str | None]:
    """fp16 of diffusion_pytorch_model.fp16-00001-of-00002.safetensors, None of diffusion_pytorch_model.safetensors."""
    words = [name.removesuffix(SINGLE_FILE).split(".") for name in names if name.endswith(SINGLE_FILE)]
    return {each[1].split("-")[0] if len(each) > 1 else None for each in words}


def why_not_loaded(origin: str, subfolder: str, options: ModelOptions, converter: str) -> str | None:
    """What is wrong with the files of a part that could not be loaded, and what to do; None if it lies elsewhere.

    Args:
        converter: the class of diffusers that opens `origin` and saves it in safetensors.
    """
    names, where = _files(origin, subfolder, options), f"{origin}/{subfolder}".rstrip("/")
    found = _variants(names)
    if found and options.variant not in found:
        wanted = "without a variant" if options.variant is None else f"of the variant {options.variant}"
        fix = "leave --variant out" if None in found else f"pass --variant {min(found)}"
        return f"{where} holds no weights {wanted}; {fix}"
    if not found and any(name.endswith(UNSAFE) for name in names):
        part = f", subfolder='{subfolder}'" if subfolder and converter != "DiffusionPipeline" else ""
        folder = f"{origin if Path(origin).is_dir() else Path(origin).name}-safetensors"
        return (
            f"{where} holds weights in a format that can run code when it is opened; convert them once: "
            f"python -c \"from diffusers import {converter} as C; C.from_pretrained('{origin}'{part})"
            f".save_pretrained('{folder}')\" and use {folder}"
        )
    return None


def _files(origin: str, subfolder: str, options: ModelOptions) -> list[str]:
    """Names of the files in a part of a model, here or on the hub; where that cannot be asked, of those fetched from it."""
    folder = Path(origin) / subfolder
    if not Path(origin).is_dir():
        if not offline(options):
            with suppress(HfHubHTTPError, HFValidationError, OSError, ValueError):
                paths = map(PurePosixPath, HfApi().list_repo_files(origin, revision=options.revision))
                return [path.name for path in paths if path.parent == PurePosixPath(subfolder)]
        config = find(origin, f"{subfolder}/config.json".lstrip("/"), options)
        folder = folder if config is None else config.parent
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []
