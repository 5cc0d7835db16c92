"""What the code is allowed to look like."""

import ast
import dataclasses
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from selfnpo.config import TrainConfig
from selfnpo.models import FAMILIES

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("selfnpo", "selfnpo_kernels") for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The modules that a file names, and those among the names that it takes from packages."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def rooms() -> dict[str, set[str]]:
    """For each package and module right below selfnpo, the others that it imports."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "selfnpo").rglob("*.py"):
        room = path.relative_to(ROOT / "selfnpo").parts[0].removesuffix(".py")
        others = {name.split(".")[1] for name in imports(path) if name.startswith("selfnpo.")}
        found.setdefault(room, set()).update(others - {room})
    return {room: others & found.keys() for room, others in found.items() if room != "__init__"}


def test_rooms_stand_on_ten_floors_and_in_no_circle():
    sorter, floors = TopologicalSorter(rooms()), 0
    sorter.prepare()  # raises where there is a circle
    while sorter.is_active():
        floors += 1
        sorter.done(*sorter.get_ready())
    assert floors <= 10


def test_what_a_room_may_not_import():
    found = rooms()
    for room in ("models", "guidance", "inputs", "sampling"):  # useful without training
        assert not found[room] & {"training", "budget", "export", "demo"}, room
    assert not found["training"] & {"budget", "export", "demo"}
    commands = {"train", "sample", "merge", "evaluate"}
    assert not [room for room, others in found.items() if others & commands]


def test_kernels_know_nothing_of_the_toolkit_and_neither_knows_tests_or_benchmarks():
    for path in SOURCES:
        packages = {name.split(".")[0] for name in imports(path)}
        assert not packages & {"tests", "benchmarks"}, path
        if "selfnpo_kernels" in path.parts:
            assert not packages & {"selfnpo", "diffusers", "transformers"}, path


def test_the_extension_knows_no_torch():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", path.read_text()), path


def test_only_the_schedule_computes_coefficients():
    """The trainer knows no formulas: alphas and sigmas are handled where rows are made."""
    for path in SOURCES:
        if path.name not in {"schedule.py", "base.py"}:
            assert "alphas_cumprod" not in path.read_text(), path


def test_only_the_families_name_a_family():
    classes = "|".join(
        {family.denoiser_class.__name__ for family in FAMILIES} | {family.pipeline_name for family in FAMILIES}
    )
    for path in SOURCES:
        if "models" not in path.parts and "demo" not in path.parts:
            assert not re.search(classes, path.read_text()), path


def read_from(path: Path, names: set[str]) -> set[str]:
    """The attributes that a file reads from variables of these names."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    owned = [(getattr(node.value, "id", getattr(node.value, "attr", None)), node) for node in nodes]
    return {node.attr for owner, node in owned if owner in names and isinstance(node.ctx, ast.Load)}


def test_every_setting_is_read_somewhere():
    config = ROOT / "selfnpo" / "config.py"
    read = read_from(config, {"given", "named"}).union(
        *(read_from(path, {"config", "options"}) for path in SOURCES if path != config),
        read_from(ROOT / "selfnpo" / "models" / "family.py", {"self"}),  # sizes of samples have methods of their own
    )
    assert {field.name for field in dataclasses.fields(TrainConfig)} <= read


def test_the_entry_point_stays_small():
    assert len((ROOT / "selfnpo" / "train.py").read_text().splitlines()) < 110


def test_no_pickle_and_no_remote_code():
    for path in SOURCES:
        source = path.read_text()
        assert not re.search(r"torch\.(load|save)\(|pickle|trust_remote_code", source), path


@pytest.mark.parametrize("hidden", ["triton", "selfnpo_kernels._C"])
def test_the_kernels_import_without(hidden):
    code = f"import sys; sys.modules[{hidden!r}] = None; import selfnpo_kernels; print(selfnpo_kernels.extension.state())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ("not available" in done.stdout) == (hidden == "selfnpo_kernels._C")


@pytest.mark.parametrize(
    ("statement", "package"),
    [
        ("import selfnpo.trainer", "training"),
        ("from selfnpo.world.metrics import Metrics", "demo"),
        ("from selfnpo import adapters", "models.lora"),
    ],
)
def test_an_import_of_old_says_where_the_module_is_now(statement, package):
    with pytest.raises(ImportError, match=f"has moved into selfnpo.{package};"):
        exec(statement)
