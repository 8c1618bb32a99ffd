"""Builds the compiled libraries with CMake and packs lowbit; metadata is in pyproject.toml.

Settings (LOWBIT_CUDA, LOWBIT_CUDA_ARCHS, MAX_JOBS) are environment variables, see docs/building.md.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# CMake's directory is kept between builds: a second `pip install` compiles only what changed.
BUILD = ROOT / "build"


def tool(name: str) -> str:
    """Return the path of cmake or ninja: from this Python's environment, else from PATH."""
    # The environment's scripts are on PATH only when it is activated, and `.venv/bin/pip install .`
    # does not activate it.
    for directory in (os.path.dirname(sys.executable), os.environ.get("PATH")):
        found = shutil.which(name, path=directory)
        if found:
            return found
    raise SystemExit(f"lowbit: {name} was not found; pip install {name}")


class BuildLibraries(build_ext):
    """Runs CMake and Ninja instead of compiling one extension module."""

    def run(self) -> None:
        settings = {
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "LOWBIT_PYTHON": sys.executable,
            "LOWBIT_CUDA": os.environ.get("LOWBIT_CUDA", "auto"),
            "LOWBIT_CUDA_ARCHS": os.environ.get("LOWBIT_CUDA_ARCHS", "default"),
        }
        defines = [f"-D{name}={value}" for name, value in settings.items()]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        cmake = tool("cmake")
        subprocess.check_call([cmake, "-G", "Ninja", "-S", ROOT, "-B", BUILD, *defines])
        subprocess.check_call([cmake, "--build", BUILD, "--parallel", jobs])
        # The build leaves the libraries in lowbit/, which is where an editable install needs them.
        if not self.inplace:
            prefix = Path(self.build_lib).resolve()
            subprocess.check_call([cmake, "--install", BUILD, "--prefix", prefix])

    def get_outputs(self) -> list[str]:
        installed = Path(self.build_lib) / "lowbit"
        return [str(path) for path in (*installed.glob("_C_*.so"), installed / "_build_info.json")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildPython(build_py):
    """Copies modules into an empty directory, since leftovers of an earlier build get packed."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class LibraryWheel(bdist_wheel):
    """One wheel for every Python 3: the libraries use no Python ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    # Named one by one, so that nothing but lowbit can ever reach the top level of site-packages.
    # kernels/ itself is no package: the PyPI package of that name must stay importable from this
    # directory.
    packages=[*find_packages(include=["lowbit", "lowbit.*"]), "lowbit.kernels"],
    package_dir={"lowbit.kernels": "kernels/triton"},
    package_data={"lowbit": ["py.typed"], "lowbit.cli": ["demo_data/*"]},
    include_package_data=False,
    # A name without sources: it makes setuptools run build_ext and tag the wheel for this platform.
    ext_modules=[Extension("lowbit._C", sources=[])],
    cmdclass={
        "build_ext": BuildLibraries,
        "build_py": BuildPython,
        "bdist_wheel": LibraryWheel,
    },
)
