import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

import tiny


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
