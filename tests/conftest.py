import os
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: its kernels then run on the CPU
os.environ["HF_HUB_OFFLINE"] = "1"  # tests need no network, and prove it
os.environ["XDG_CACHE_HOME"] = "/dev/null"  # what one test measures, no other one remembers
os.environ["HF_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "home")  # not the user's
os.environ["MPLCONFIGDIR"] = os.environ["HF_HOME"]
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

from huggingface_hub import constants
from torch import _dynamo

import tiny
from commands import call
from fine_tunes import changed
from selfnpo.models import PretrainedModel, load_pretrained


def pytest_configure():
    """The same reductions, hence the same bits, whatever the machine; before any fixture is made."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and there is none"))


@pytest.fixture(autouse=True)
def _whatever_ran_before():
    """Every test finds PyTorch as the first one does, with the same random numbers."""
    torch.manual_seed(0)
    _dynamo.reset()
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, _dynamo.config.recompile_limit
    yield
    matmul.allow_tf32, cudnn.allow_tf32, _dynamo.config.recompile_limit = before
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _demo() -> PretrainedModel:
    return load_pretrained()


@pytest.fixture
def demo(_demo) -> PretrainedModel:
    """A copy, for adapters are added to the model itself."""
    return deepcopy(_demo)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """The folder of a tiny model, built when it is first asked for. Tests leave it as it is."""
    root, built = tmp_path_factory.mktemp("models"), {}

    def folder(family: str) -> Path:
        if family not in built:
            built[family] = tiny.save(family, root / family)
        return built[family]

    return folder


@pytest.fixture
def put_in_cache(tmp_path, monkeypatch):
    """Lays out a folder as the hub's client does that has fetched it."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def put(folder: Path, hub_id: str) -> None:
        repository = cache / f"models--{hub_id.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)

    return put


@pytest.fixture
def pipe(models):
    """A plain diffusers pipeline, text to image."""
    import pipelines  # which imports many pipelines of diffusers

    return pipelines.load(models("stable_diffusion"), pipelines.StableDiffusionPipeline)


@pytest.fixture
def negative_of(tmp_path):
    """A negative of either kind for a pipeline: a denoiser, or the folder of a LoRA."""
    import pipelines

    def make(kind, pipe):
        return changed(pipe.unet) if kind == "whole" else pipelines.save_lora(tmp_path / "negative", pipe)[0]

    return make


@pytest.fixture
def merged(tmp_path):
    """Runs the command and returns the folder that it wrote."""

    def run(base, negative, *flags):
        folder = tmp_path / "merged"
        model = ("--pretrained_model_name_or_path", base, "--negative", negative, "--output_dir", folder, "--overwrite")
        assert call("merge", *model, *flags) == 0
        return folder

    return run
