"""What pip installs."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_the_extension_and_the_demo_without_network_or_torch(tmp_path):
    """Offline, as `--no-build-isolation --no-deps` promises; torch is hidden, for the build must not need it."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "*.so"))
    (source / "hide" / "torch").mkdir(parents=True)
    (source / "hide" / "torch" / "__init__.py").write_text("raise ImportError('the build must not import torch')")
    # An earlier installation leaves the path of a ninja behind that went with its environment.
    stale = source / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "cmake" / "CMakeCache.txt"
    stale.parent.mkdir(parents=True)
    stale.write_text("CMAKE_GENERATOR:INTERNAL=Ninja\nCMAKE_MAKE_PROGRAM:FILEPATH=/gone/ninja\n")
    offline = ["--no-build-isolation", "--no-deps", "--no-index"]
    build = [sys.executable, "-m", "pip", "wheel", *offline, "-w", str(tmp_path), "."]
    environment = {**os.environ, "PYTHONPATH": str(source / "hide"), "CMAKE_ARGS": "-DSELFNPO_CUDA=OFF"}
    done = subprocess.run(build, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("selfnpo_kernels/_C.") and name.endswith(".so") for name in names)
    weights = [info for info in zipfile.ZipFile(wheel).infolist() if info.filename.endswith(".safetensors")]
    assert [info.filename for info in weights] == ["selfnpo/demo/weights/transformer/diffusion_pytorch_model.safetensors"]
    assert weights[0].file_size < 2_000_000
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"selfnpo", "selfnpo_kernels"}
    modules = (path for package in ("selfnpo", "selfnpo_kernels") for path in (ROOT / package).rglob("*.py"))
    assert {path.relative_to(ROOT).as_posix() for path in modules} <= set(names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = "from selfnpo_kernels import extension, triton_kernels; print(extension.state())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "installed", capture_output=True, text=True, check=True
    )
    assert "no CUDA: built without nvcc" in done.stdout


def test_env_tells_what_runs_here():
    done = subprocess.run([sys.executable, "-m", "selfnpo.env"], capture_output=True, text=True, check=True)
    for name in ("python", "torch", "diffusers", "selfnpo_kernels._C", "gpu"):
        assert name in done.stdout
    assert "built by" in done.stdout
