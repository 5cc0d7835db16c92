"""Where the parts of a model come from: a diffusers folder, a hub id, or a single file beside a configuration.

No code comes with a model: weights are safetensors, classes are diffusers' own.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from packaging.version import Version
from torch import nn

from selfnpo.errors import UserError
from selfnpo.models.class_conditional import ClassConditional
from selfnpo.models.cogvideox import CogVideoX
from selfnpo.models.demo import DEMO, DEMO_FOLDER
from selfnpo.models.family import Config, Family
from selfnpo.models.stable_diffusion import StableDiffusion
from selfnpo.models.stable_diffusion_xl import StableDiffusionXL
from selfnpo.models.unconditional import Unconditional

FAMILIES: tuple[Family, ...] = (StableDiffusion(), StableDiffusionXL(), CogVideoX(), Unconditional(), ClassConditional())
SINGLE_FILE = ".safetensors"
DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"
LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers names it
UNSAFE = (".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class ModelOptions:
    """Which model."""

    pretrained_model_name_or_path: str = DEMO
    """The base: demo, a diffusers folder, a Hugging Face id, or a single .safetensors file."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    variant: str | None = None
    """Weights with this word in their file names, such as fp16."""
    local_files_only: bool = False
    """Use what is on disk and in the cache; never ask the hub."""
    single_file_config: str | None = None
    """For a single file: a diffusers folder or id with its configuration; by default the one that diffusers recognises."""
    denoiser_name_or_path: str | None = None
    """UNet or transformer in place of the base's own: a folder, an id or a file, as of Diffusion-DPO and SePPO."""
    lora_name_or_path: str | None = None
    """LoRA to merge into the base: a folder, an id or a file."""
    lora_scale: float = 1.0
    """Strength of that LoRA."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the denoiser predicts, where the base's scheduler says it wrongly."""


class Source:
    """The parts of the model that `options` name. Opening it reads configurations only.

    Raises:
        UserError: the model cannot be found, reached or recognised.
    """

    def __init__(self, options: ModelOptions):
        self.options = options
        name = options.pretrained_model_name_or_path
        self.is_demo = name == DEMO
        _refuse_unsafe(name)
        self.file = Path(name) if name.endswith(SINGLE_FILE) else None
        if self.file is None:
            self.layout = str(DEMO_FOLDER) if self.is_demo else name
        else:
            self.layout = options.single_file_config or _recognise(self.file)
        self.component, self.subfolder, self.config = self._find_denoiser()
        self.family = self._find_family()
        self.family.check(self.config)

    def _find_denoiser(self) -> tuple[str, str, Config]:
        """Name in the pipeline, folder and configuration of the denoiser."""
        for component in ("unet", "transformer"):
            config = self._json(f"{component}/config.json")
            if config is not None:
                return component, component, config
        # Older unconditional models lie beside their model_index.json.
        index, config = self._json("model_index.json"), self._json("config.json")
        if index and config:
            for component in ("unet", "transformer"):
                if component in index:
                    return component, "", config
        raise UserError(
            f"{self.layout} holds no unet/config.json and no transformer/config.json; expected a diffusers pipeline"
            + (" (a UNet alone goes into --denoiser_name_or_path)" if config else "")
        )

    def _find_family(self) -> Family:
        class_name = self.config.get("_class_name")
        for family in FAMILIES:
            if family.denoiser_class.__name__ == class_name and family.matches(self.config):
                # A configuration lists only what differs from the class's defaults.
                defaults = {name: p.default for name, p in _signature(family.denoiser_class).items()}
                self.config = defaults | self.config
                return family
        known = ", ".join(sorted({family.denoiser_class.__name__ for family in FAMILIES}))
        raise UserError(f"{self.layout} is built on {class_name}, which is of no family known here; expected one of {known}")

    def _json(self, filename: str) -> dict[str, Any] | None:
        """A JSON file of the layout, or None where it has no such file."""
        path = _find(self.layout, filename, self.options)
        try:
            return None if path is None else json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{filename} of {self.layout} could not be read: {first_line(error)}") from error

    @cached_property
    def scheduler(self) -> SchedulerMixin:
        """The pipeline's own scheduler, which defines the noise levels."""
        for folder in ("scheduler", ""):
            config = self._json(f"{folder}/scheduler_config.json".lstrip("/"))
            if config is None:
                continue
            scheduler_class = getattr(diffusers, str(config.get("_class_name")), None)
            if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)):
                raise UserError(
                    f"the scheduler of {self.layout} is {config.get('_class_name')}, which diffusers does not know"
                )
            if self.options.prediction_type is not None:
                config["prediction_type"] = self.options.prediction_type
            return scheduler_class.from_config(config)
        raise UserError(
            f"{self.layout} has no scheduler/scheduler_config.json; expected 'demo' or a complete diffusers pipeline"
        )

    @cached_property
    def scale(self) -> int:
        """Pixels per latent in each direction; 1 for models in pixel space."""
        config = self._json("vae/config.json")
        return 1 if config is None else 2 ** (len(config["block_out_channels"]) - 1)

    def vae(self) -> ModelMixin | None:
        """The autoencoder in float32, or None for models in pixel space."""
        if self._json("vae/config.json") is None:
            return None
        return self.pipeline(("vae",), torch.float32).vae.eval().requires_grad_(False)

    def empty_denoiser(self) -> ModelMixin:
        """The denoiser without weights, on the meta device."""
        with init_empty_weights():  # torch.device("meta") loses its effect after some uses of torch.compile
            model = self.family.denoiser_class.from_config(self.config)
        return nn.Module.to(model, "meta")

    def denoiser(self, dtype: torch.dtype) -> ModelMixin:
        """The base's denoiser on the CPU, with its replacement and LoRA applied, in evaluation mode.

        Raises:
            UserError: weights are missing, corrupt, in an unsafe format or of another architecture.
        """
        options, family = self.options, self.family
        if options.denoiser_name_or_path is None:
            model = self._load_denoiser(self.file or self.layout, self.subfolder, dtype)
        else:
            model = self.replacement(options.denoiser_name_or_path, dtype)
        if options.lora_name_or_path is not None:
            merge_lora(model, family, options, dtype)
        return model.eval().requires_grad_(False)

    def replacement(self, name: str, dtype: torch.dtype) -> ModelMixin:
        """Another denoiser of the base's architecture: from its own folder, or from the pipeline that holds it."""
        _refuse_unsafe(name)
        subfolder = ""
        if not name.endswith(SINGLE_FILE):
            found = _find(name, "config.json", self.options)
            if found is None:
                subfolder = self.component
                if _find(name, f"{subfolder}/config.json", self.options) is None:
                    raise UserError(
                        f"{name} holds no config.json and no {subfolder}/config.json; expected a "
                        f"{self.family.denoiser_class.__name__} (config.json and *.safetensors)"
                    )
        model = self._load_denoiser(Path(name) if name.endswith(SINGLE_FILE) else name, subfolder, dtype)
        expected = {key: tensor.shape for key, tensor in self.empty_denoiser().state_dict().items()}
        got = {key: tensor.shape for key, tensor in model.state_dict().items()}
        for key in sorted(expected.keys() | got.keys()):
            if expected.get(key) != got.get(key):
                raise UserError(
                    f"{name} has another architecture than the base: {key} is {_shape(got.get(key))}, "
                    f"expected {_shape(expected.get(key))}"
                )
        return model.eval().requires_grad_(False)

    def _load_denoiser(self, origin: str | Path, subfolder: str, dtype: torch.dtype) -> ModelMixin:
        kind, options = self.family.denoiser_class, self.options
        if isinstance(origin, str):
            _refuse_unsafe_folder(origin, subfolder, "diffusers", kind.__name__)
        try:
            if isinstance(origin, Path):
                model, info = self._from_single_file(origin, dtype), {}
            else:
                model, info = kind.from_pretrained(
                    origin, subfolder=subfolder, revision=options.revision, variant=options.variant, torch_dtype=dtype,
                    use_safetensors=True, local_files_only=options.local_files_only, output_loading_info=True,
                    low_cpu_mem_usage=False,
                )  # fmt: skip
        except UserError:
            raise
        except Exception as error:  # diffusers raises many kinds, also from the parsers beneath it
            raise UserError(f"{origin} could not be loaded as a {kind.__name__} in safetensors: {_reason(error)}") from error
        _check_complete(model, str(origin))
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(problem):
                raise UserError(
                    f"{origin} does not fit its config.json: {problem.replace('_', ' ')} such as {info[problem][0]}"
                )
        if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
            raise UserError(f"{origin} holds weights that are inf or NaN; restore them from an intact copy")
        return model

    def _from_single_file(self, file: Path, dtype: torch.dtype) -> ModelMixin:
        kind = self.family.denoiser_class
        if not hasattr(kind, "from_single_file"):
            raise UserError(
                f"{file} is a single file, which diffusers does not read for {kind.__name__}; use a diffusers folder"
            )
        return kind.from_single_file(
            str(file), config=self.layout, subfolder=self.subfolder, torch_dtype=dtype,
            local_files_only=self.options.local_files_only,
        )  # fmt: skip

    def pipeline(self, wanted: tuple[str, ...], dtype: torch.dtype) -> DiffusionPipeline:
        """The family's pipeline with the components in `wanted` alone, and the scheduler.

        Raises:
            UserError: one of them is missing or cannot be loaded.
        """
        kind, options = self.family.pipeline_class, self.options
        expected, _ = kind._get_signature_keys(kind)
        left_out = {name: None for name in expected if name not in (*wanted, "scheduler")}
        index = self._json("model_index.json") or {}
        for name in wanted:
            if index.get(name, (None, None))[0] is None:
                raise UserError(f"{self.layout} has no {name} in its model_index.json; expected a complete {kind.__name__}")
            _refuse_unsafe_folder(self.layout, name, *index[name])
        try:
            if self.file is not None:
                pipeline = kind.from_single_file(
                    str(self.file), config=self.layout, local_files_only=options.local_files_only, **{DTYPE: dtype},
                    **left_out,
                )  # fmt: skip
            else:
                pipeline = kind.from_pretrained(
                    self.layout, revision=options.revision, variant=options.variant, use_safetensors=True, **{DTYPE: dtype},
                    local_files_only=options.local_files_only, scheduler=self.scheduler, **left_out,
                )  # fmt: skip
        except Exception as error:  # as above
            names = ", ".join(wanted)
            raise UserError(f"{names} of {self.layout} could not be loaded in safetensors: {_reason(error)}") from error
        for name in wanted:
            if isinstance(part := getattr(pipeline, name), nn.Module):
                _check_complete(part, str(self.file or self.layout))
        return pipeline


def _reason(error: Exception) -> str:
    """What diffusers meant; it fails to move weights of a single file that it did not find."""
    return "it lacks weights; expected a complete checkpoint" if "meta tensor" in str(error) else first_line(error)


def _check_complete(model: nn.Module, origin: str) -> None:
    """Single files may lack weights, which diffusers then leaves without values."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UserError(f"{origin} could not be loaded: it holds no {name}; expected a complete checkpoint")


def merge_lora(model: ModelMixin, family: Family, options: ModelOptions, dtype: torch.dtype) -> None:
    """Add a LoRA, in any format that diffusers reads, to the weights of a denoiser.

    Raises:
        UserError: the LoRA cannot be read, or belongs to another base.
    """
    name, kind = options.lora_name_or_path, family.pipeline_class
    _refuse_unsafe(name)
    if not hasattr(kind, "lora_state_dict"):
        raise UserError(f"lora_name_or_path is {name}, but diffusers has no LoRA for {kind.__name__}")
    known = {"unet_config": model.config} if family.component == "unet" else {}
    try:
        found = kind.lora_state_dict(
            name, return_lora_metadata=True, use_safetensors=True, local_files_only=options.local_files_only,
            revision=options.revision if name == options.pretrained_model_name_or_path else None, **known,
        )  # fmt: skip
        state_dict, metadata = found[0], found[-1]
        alphas = found[1] if len(found) == 3 else None
    except Exception as error:  # as above
        raise UserError(f"{name} could not be read as a LoRA in safetensors: {_reason(error)}") from error
    prefix = f"{family.component}."
    ours = {key: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    _check_lora(name, ours, prefix, model)
    if len(ours) < len(state_dict):
        print(f"note: {name} also changes the text encoder; only its {family.component} part is merged")
    try:
        model.load_lora_adapter(
            ours,
            prefix=family.component,
            network_alphas=None if metadata else alphas,
            metadata=metadata,
            adapter_name="merged",
        )
        model.fuse_lora(lora_scale=options.lora_scale, safe_fusing=True, adapter_names=["merged"])
        model.unload_lora()
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{name} does not fit {options.pretrained_model_name_or_path}: {first_line(error)}") from error
    nn.Module.to(model, dtype)  # diffusers' own `to` would warn of modules to keep in float32, of which there are none


def _check_lora(name: str, state_dict: dict[str, torch.Tensor], prefix: str, model: ModelMixin) -> None:
    if not state_dict:
        raise UserError(f"{name} holds nothing for the {prefix.rstrip('.')}; expected a LoRA of this family")
    layers = dict(model.named_modules())
    for key, tensor in state_dict.items():
        path, _, kind = key.removeprefix(prefix).partition(".lora")
        weight = getattr(layers.get(path), "weight", None)
        if kind.startswith(("_A", ".down")) and (weight is None or weight.shape[1] != tensor.shape[1]):
            got = "has no such layer" if weight is None else f"has {weight.shape[1]} inputs there"
            raise UserError(
                f"{name} is a LoRA for another base: it changes {path} ({tensor.shape[1]} inputs), the base {got}"
            )


def _signature(kind: type) -> dict[str, Any]:
    import inspect

    parameters = inspect.signature(kind.__init__).parameters
    return {name: p for name, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _find(origin: str, filename: str, options: ModelOptions) -> Path | None:
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
        if options.local_files_only and _cached(origin):
            return None
        raise _unreachable(origin, error) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise _unreachable(origin, error) from error


def _cached(origin: str) -> bool:
    """Whether the hub's cache holds anything of a repository."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE) / f"models--{origin.replace('/', '--')}" / "snapshots").is_dir()


def _unreachable(origin: str, error: Exception) -> UserError:
    return UserError(
        f"{origin} is no folder here and could not be fetched from the hub; expected 'demo', a diffusers folder, a "
        f"{SINGLE_FILE} file or a Hugging Face id that can be reached ({first_line(error)})"
    )


def _recognise(file: Path) -> str:
    """The hub id whose configuration diffusers gives to a single file, from the names of its tensors."""
    if not file.is_file():
        raise UserError(f"{file} does not exist; expected a single {SINGLE_FILE} file")
    try:
        return fetch_diffusers_config(load_single_file_checkpoint(str(file)))["pretrained_model_name_or_path"]
    except Exception as error:  # as above
        raise UserError(
            f"{file} could not be recognised as a diffusion model; name a diffusers folder with its configuration in "
            f"--single_file_config ({first_line(error)})"
        ) from error


def _refuse_unsafe(name: str) -> None:
    if name.endswith(UNSAFE):
        folder = Path(name).with_suffix("")
        raise UserError(
            f'{name} is in a format that can run code when it is opened; convert it once: python -c "from diffusers import '
            f"StableDiffusionPipeline as P; P.from_single_file('{name}').save_pretrained('{folder}')\" and use {folder}"
        )


def _refuse_unsafe_folder(origin: str, subfolder: str, library: str, class_name: str) -> None:
    folder = Path(origin) / subfolder
    if folder.is_dir() and not any(folder.glob(f"*{SINGLE_FILE}")) and any(folder.glob("*.bin")):
        convert = f"M.from_pretrained('{folder}', use_safetensors=False).save_pretrained('{folder}')"
        raise UserError(
            f"{folder} holds weights in a format that can run code when it is opened; convert them once: "
            f'python -c "from {library} import {class_name} as M; {convert}"'
        )


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
