"""Build the extension selfnpo_kernels._C with CMake and ninja; everything else is in pyproject.toml.

CMAKE_ARGS adds arguments, for example CMAKE_ARGS=-DSELFNPO_CUDA=OFF for an extension without CUDA.
SELFNPO_NO_EXTENSION=1 builds no extension: the package is then pure Python, and its operations run on plain PyTorch.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NO_COMPILER = re.compile("No CMAKE_CXX_COMPILER could|CMAKE_CXX_COMPILER not set|not a full path to an existing compiler")
WITHOUT = "SELFNPO_NO_EXTENSION=1 installs without it: everything works, but slower on a CPU"


class Build(build):
    """Builds the extension first, so that an error does not follow hundreds of other lines."""

    sub_commands = sorted(build.sub_commands, key=lambda command: command[0] != "build_ext")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError:
            sys.exit(f"error: pybind11 was not found. Run pip install pybind11 cmake ninja. {WITHOUT}.")
        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        folder = Path(self.build_temp).resolve() / "cmake"
        folder.mkdir(parents=True, exist_ok=True)
        self.cmake(
            "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={destination}", *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        )  # fmt: skip
        self.cmake("--build", str(folder))

    def cmake(self, *arguments: str) -> None:
        """Run cmake; it is found even if the virtual environment is not activated."""
        path = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))
        try:
            done = subprocess.run(
                ["cmake", *arguments], env=os.environ | {"PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True,
            )  # fmt: skip
        except FileNotFoundError:
            sys.exit(f"error: cmake was not found. Run pip install pybind11 cmake ninja. {WITHOUT}.")
        if "CMAKE_MAKE_PROGRAM is not set" in done.stdout:
            sys.exit(f"error: ninja was not found. Run pip install pybind11 cmake ninja. {WITHOUT}.")
        if NO_COMPILER.search(done.stdout):
            sys.exit(f"error: no C++ compiler was found. Install one, such as g++ or clang++. {WITHOUT}.")
        if done.returncode:
            sys.exit(f"{done.stdout}\nerror: the C++ extension could not be built, see above. {WITHOUT}.")
        print(done.stdout)


if "develop" in sys.argv:  # pip before 21.3 runs this for pip install -e
    sys.exit("error: an editable installation needs pip 21.3 or newer. Run pip install --upgrade pip, then pip install -e .")
extensions = [] if os.environ.get("SELFNPO_NO_EXTENSION") == "1" else [Extension("selfnpo_kernels._C", sources=[])]
setup(ext_modules=extensions, cmdclass={"build": Build, "build_ext": CMakeBuild})
