"""python -m selfnpo.merge: theta + alpha eta + beta delta, or theta - k delta, written as one model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from selfnpo.cli import parse, run
from selfnpo.errors import UserError
from selfnpo.models import Source
from selfnpo.models.origin import check_exists
from selfnpo.options import LARGEST, MixOptions, ModelOptions
from selfnpo.output import check_kept, check_output

# The files of a model, as diffusers names them.
RESULTS = ("config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.safetensors.index.json")


@dataclass(frozen=True)
class MergeConfig(MixOptions, ModelOptions):
    """Write theta + alpha eta + beta delta, or theta - k delta, as one model."""

    beta: float = 1.0
    """Weight of delta in the result."""
    extrapolate: float | None = None
    """k: write theta - k delta instead, a model that you sample from without a negative."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Dtype of the result; by default that of the base's files, or float32 if they mix dtypes or must be converted."""
    output_dir: Path = Path("merged")
    """Folder for config.json and the weights, in diffusers' format."""
    overwrite: bool = False
    """Replace an earlier result in output_dir."""


def check(config: MergeConfig) -> None:
    k = config.extrapolate
    if k is not None:
        if not 0 < k < LARGEST:
            raise UserError(
                f"extrapolate is {k}; expected a finite number above 0 and below {LARGEST:,}, the k of theta - k delta"
            )
        if config.positive is not None or (config.alpha, config.beta) != (1, 1):
            raise UserError("extrapolate writes theta - k delta and nothing else; leave out --positive, --alpha and --beta")
    config.check_shares([config.beta])
    folder = config.output_dir
    check_kept(folder, (*config.sources, config.negative, config.positive))
    check_output(folder, config.overwrite)
    others = sorted(path.name for path in folder.glob("*") if not any(map(path.match, RESULTS)))
    if others:
        raise UserError(
            f"output_dir {folder} contains {others[0]}, which is not part of a merged model; choose another folder"
        )


def main(config: MergeConfig) -> None:
    check(config)
    config.name_default(config.pretrained_model_name_or_path)
    for name in filter(None, (config.negative, config.positive)):
        check_exists(str(name), config)
    print("loading PyTorch and diffusers")
    import torch  # imported here so that mistakes are reported before PyTorch loads

    from selfnpo.export.merged import dtype_name, formula, merge
    from selfnpo.models import check_negative

    source, folder, k = Source(config), config.output_dir, config.extrapolate
    for name in filter(None, (config.negative, config.positive)):
        check_negative(name, source)  # before the base is read
    beta = config.beta if k is None else -k
    positive = None if config.positive is None else str(config.positive)
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    dtype = merge(source, str(config.negative), folder, positive=positive, alpha=config.alpha, beta=beta, dtype=dtype)
    use = "--negative" if k is None else "--denoiser_name_or_path"
    opens = f"{source.family.denoiser_class.__name__}.from_pretrained('{folder}')"
    what = formula(config.alpha, beta, positive is not None)
    print(f"written to {folder}: {what} in {dtype_name(dtype)}; use it with {use} {folder} or {opens}")


def command(args: Sequence[str] | None = None) -> None:
    main(parse(MergeConfig, args))


if __name__ == "__main__":
    run(command)
