"""What pip installs, from a source distribution, and where there is no compiler."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import selfnpo_kernels
from dependencies import MODULES, declared

ROOT = Path(__file__).parents[1]
OFFLINE = ["--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir"]
PACKAGES = ("selfnpo", "selfnpo_kernels")


def run(*command, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """With what is given alone of the variables that matter to a build or an import."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CMAKE_ARGS", "CXX")}
    return subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True)


def build_wheel(source: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return run(sys.executable, "-m", "pip", "wheel", *OFFLINE, "-w", str(folder), ".", cwd=source, **environment)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked source distribution, made without torch, for the build must not need it."""
    folder = tmp_path_factory.mktemp("sdist")
    checkout = folder / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "*.so"))
    (folder / "hide" / "torch").mkdir(parents=True)
    (folder / "hide" / "torch" / "__init__.py").write_text("raise ImportError('the build must not import torch')")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    done = run(sys.executable, "-c", code, cwd=checkout, PYTHONPATH=str(folder / "hide"))
    assert done.returncode == 0, done.stderr
    shutil.unpack_archive(folder / f"selfnpo-{selfnpo_kernels.__version__}.tar.gz", folder)
    return folder / f"selfnpo-{selfnpo_kernels.__version__}"


def test_no_folder_hides_an_editable_install(sdist, tmp_path):
    """As the clone, named selfnpo, does for a script beside it, if the install is an import hook instead of a path."""
    code = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    assert run(sys.executable, "-c", code, cwd=sdist, SELFNPO_NO_EXTENSION="1").returncode == 0
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        installed = [name for name in wheel.namelist() if ".dist-info/" not in name]
        assert installed == [f"__editable__.selfnpo-{selfnpo_kernels.__version__}.pth"]
        assert wheel.read(installed[0]).decode().strip() == str(sdist)


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the source distribution, offline, as `--no-build-isolation --no-deps` promises."""
    source = tmp_path_factory.mktemp("source") / "source"
    shutil.copytree(sdist, source)
    # An earlier installation leaves the path of a ninja behind that went with its environment.
    stale = source / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "cmake" / "CMakeCache.txt"
    stale.parent.mkdir(parents=True)
    stale.write_text("CMAKE_GENERATOR:INTERNAL=Ninja\nCMAKE_MAKE_PROGRAM:FILEPATH=/gone/ninja\n")
    folder = tmp_path_factory.mktemp("wheel")
    done = build_wheel(source, folder, PYTHONPATH=str(sdist.parent / "hide"), CMAKE_ARGS="-DSELFNPO_CUDA=OFF")
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def pure_wheel(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pure")
    nothing = {"PATH": str(folder), "CXX": "/no/compiler"}  # neither cmake nor a compiler
    done = build_wheel(sdist, folder, SELFNPO_NO_EXTENSION="1", **nothing)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / f"selfnpo-{selfnpo_kernels.__version__}-py3-none-any.whl"


def installed(wheel: Path, folder: Path) -> Path:
    """The interpreter of an environment with this wheel, and with the dependencies of the running one."""
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder.parent)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    zipfile.ZipFile(wheel).extractall(packages)
    return python


def test_the_wheel_holds_the_extension_and_the_demo(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("selfnpo_kernels/_C.") and name.endswith(".so") for name in names)
    weights = [info for info in zipfile.ZipFile(wheel).infolist() if info.filename.endswith(".safetensors")]
    assert [info.filename for info in weights] == ["selfnpo/demo/weights/transformer/diffusion_pytorch_model.safetensors"]
    assert weights[0].file_size < 2_000_000
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == set(PACKAGES)
    shipped = (path for package in PACKAGES for kind in ("*.py", "py.typed") for path in (ROOT / package).rglob(kind))
    assert {path.relative_to(ROOT).as_posix() for path in shipped} <= set(names)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)


USE = """
import warnings, torch, selfnpo, selfnpo_kernels
warnings.simplefilter("error")
assert selfnpo.__file__.startswith({folder!r}) and selfnpo_kernels.__file__.startswith({folder!r})
assert selfnpo.__version__ == selfnpo_kernels.__version__ == {version!r}
assert selfnpo_kernels.tweedie(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2)).equal(torch.full((1, 2), 2.0))
threads = {{}}
for count in (1, 2):
    torch.set_num_threads(count)
    threads[count] = selfnpo_kernels.forward_jump(torch.ones(2, 200_000), torch.ones(2, 2), 1, 2, torch.arange(2))
assert threads[1].equal(threads[2])
print(len({{line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}}))
"""


def test_a_wheel_from_the_sdist_works_in_an_empty_environment_without_compiler(wheel, tmp_path):
    python = installed(wheel, tmp_path / "environment")
    code = USE.format(folder=str(tmp_path / "environment"), version=selfnpo_kernels.__version__)
    done = run(python, "-c", code, cwd=tmp_path, PATH=str(python.parent))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"  # kernels and torch share one pool of threads
    done = run(python, "-m", "selfnpo.env", cwd=tmp_path, PATH=str(python.parent))
    assert "no CUDA: built without nvcc" in done.stdout, done.stderr


def test_without_extension_the_wheel_is_pure_and_the_reference_runs(pure_wheel, tmp_path):
    assert not [name for name in zipfile.ZipFile(pure_wheel).namelist() if name.endswith(".so")]
    python = installed(pure_wheel, tmp_path / "environment")
    code = "import torch, selfnpo_kernels; print(selfnpo_kernels.tweedie(*[torch.ones(1, 2)] * 3).sum().item())"
    done = run(python, "-c", code, cwd=tmp_path)
    assert done.stdout.strip() == "4.0", done.stderr
    assert "tweedie runs on the slower reference: the extension is not available" in done.stderr
    done = run(python, "-m", "selfnpo.env", cwd=tmp_path)
    assert re.search(r"^kernels +cpu reference", done.stdout, re.MULTILINE)
    assert "_C   not available" in done.stdout
    assert "run pip install --no-deps . in the source folder; this needs a C++ compiler" in done.stdout


def test_a_checkout_in_front_of_an_installation_is_recognised(wheel, sdist, tmp_path):
    """Python finds the folder in which it starts before what is installed."""
    python = installed(wheel, tmp_path / "environment")
    code = "from selfnpo_kernels import extension; print(extension.state())"
    shadowed = run(python, "-c", code, cwd=sdist).stdout
    assert (
        f"Python uses the source code in {sdist}, where the extension is not built: run pip install -e . there, or"
        in shadowed
    )
    assert "start Python in another folder" in shadowed
    assert run(python, "-c", code, cwd=tmp_path).stdout.startswith("built by")  # and that helps


def test_without_compiler_the_build_says_one_sentence(sdist, tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("cmake", "ninja"):
        found = shutil.which(name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
        (programs / name).symlink_to(found)
    hidden = {"PATH": str(programs), "CMAKE_ARGS": "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF"}
    for environment in (hidden, {"CXX": "/no/compiler"}, {"CMAKE_ARGS": "-DCMAKE_CXX_COMPILER=/no/compiler"}):
        done = build_wheel(sdist, tmp_path, **environment)
        assert done.returncode == 1
        said = re.search(r"\[(\d+) lines of output\](.*?)\[end of output\]", done.stdout + done.stderr, re.DOTALL)
        assert int(said[1]) <= 6
        assert "error: no C++ compiler was found. Install one, such as g++ or clang++. SELFNPO_NO_EXTENSION=1" in said[2]


def test_an_old_pip_is_told_what_an_editable_installation_needs():
    """Before 21.3 pip runs `setup.py develop`, with the setuptools of the environment."""
    done = run(sys.executable, "setup.py", "develop", "--no-deps", cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: an editable installation needs pip 21.3 or newer.")
    assert len(done.stderr.splitlines()) == 1


def test_the_kernels_work_with_torch_alone(wheel, tmp_path):
    """`pip install torch && pip install --no-deps .` is enough for them."""
    python = installed(wheel, tmp_path / "environment")
    others = {MODULES.get(name, name) for name in declared() - {"torch"}} | set(MODULES.values()) | {"triton"}
    code = f"""
import sys
for name in {sorted(others)}:
    sys.modules[name] = None
import warnings, torch
warnings.simplefilter("error")
import selfnpo_kernels as k
x, ids = torch.ones(2, 8, requires_grad=True), torch.arange(2)
out, target = k.guided_step(x, x, x, 2.0, torch.ones(2, 4))
loss = k.x0_loss(k.forward_jump(x, torch.ones(2, 2), 1, 2, ids), out, k.tweedie(x, x, torch.ones(2, 2)), torch.ones(2, 3))
(loss + k.cfg_combine(x, 2.0).sum() + k.philox_normal((2, 4), 1).sum()).backward()
k.fused_adamw_([x.detach()], [x.grad], [torch.zeros(2, 8)], [torch.zeros(2, 8)], step=1, lr=0.1)
print(k.dispatch.summary())
"""
    done = run(python, "-c", code, cwd=tmp_path)
    assert done.stdout.startswith("cpu cpp, cuda reference"), done.stderr


@pytest.mark.slow
def test_make_wheel(tmp_path, sdist):
    """Offline, with the build tools of this environment in the place of what it would install."""
    source = tmp_path / "source"
    shutil.copytree(sdist, source)
    shutil.copy(ROOT / "Makefile", source)
    environment = tmp_path / "tools"
    run(sys.executable, "-m", "venv", "--without-pip", str(environment), cwd=tmp_path)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "tools.pth").write_text(sysconfig.get_path("purelib"))
    (environment / "installed").touch()
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = run("make", "wheel", f"WHEELS={environment}", cwd=source, CMAKE_ARGS="-DSELFNPO_CUDA=OFF", PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    assert re.search(rf"-cp3{sys.version_info.minor}-cp3{sys.version_info.minor}-manylinux_2_\d+_x86_64.whl", wheel.name)
    assert [path.name for path in (source / "dist").glob("*.tar.gz")] == [f"selfnpo-{selfnpo_kernels.__version__}.tar.gz"]
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if ".libs/" in name]  # torch brings libgomp
    python = installed(wheel, tmp_path / "environment")
    code = USE.format(folder=str(tmp_path / "environment"), version=selfnpo_kernels.__version__)
    done = run(python, "-c", code, cwd=tmp_path, PATH=str(python.parent))
    assert done.stdout.strip() == "1", done.stderr
