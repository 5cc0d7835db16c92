from pathlib import Path

import pytest

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
