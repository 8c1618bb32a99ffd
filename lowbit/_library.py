"""Finds the compiled libraries and loads them; records why when it cannot.

`_C_cpu.so` and `_C_cuda.so` lie beside this file. They register operators under
`torch.ops.lowbit_cpu` and `torch.ops.lowbit_cuda`, and hold no Python ABI. Importing this module
tries each once. Nothing here raises: without a library lowbit works through the backends that
remain, and `load_errors` says what is missing.
"""

from __future__ import annotations

import ctypes
import functools
import json
import re
from pathlib import Path

import torch

MINIMUM_TORCH = (2, 10)  # CMakeLists.txt compiles against the stable ABI of this release
LIBRARIES = {"cpu": "_C_cpu.so", "cuda": "_C_cuda.so"}

#: backend -> why its library is not there. A library that is loaded has no entry.
load_errors: dict[str, str] = {}


def library_path(backend: str) -> Path:
    """Return where the library of backend "cpu" or "cuda" is expected."""
    return Path(__file__).parent / LIBRARIES[backend]


def available(backend: str) -> bool:
    """Tell whether the library of backend "cpu" or "cuda" is loaded, not whether a GPU is there."""
    return backend not in load_errors


@functools.cache
def build_info() -> dict:
    """Return the record that the build left, {} without a build.

    Keys: torch, torch_cuda, system, cxx, cpu_levels, cuda (bool), cuda_reason, nvcc, cuda_archs.
    """
    try:
        return json.loads((Path(__file__).parent / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}


def driver_cuda_version() -> tuple[int, int] | None:
    """Return the CUDA version that the NVIDIA driver supports, None without a driver."""
    try:
        number = ctypes.c_int()
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return None if failed else (number.value // 1000, number.value % 1000 // 10)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _torch_obstacle() -> str | None:
    """Say why no compiled library can run under this torch, or None."""
    if _version(torch.__version__) < MINIMUM_TORCH:
        return f"the compiled libraries need torch 2.10 or newer, this is {torch.__version__}"
    return None


def _cuda_obstacle() -> str | None:
    """Say why the CUDA library cannot run here, or None.

    Checked before loading: the loader's own message for a torch without CUDA ("libtorch_cuda.so:
    cannot open shared object file") points at the wrong thing.
    """
    if torch.version.cuda is None:
        build = "a ROCm build" if torch.version.hip else "built without CUDA"
        return f"this torch ({torch.__version__}) is {build}; install a CUDA build of torch"
    toolkit = build_info().get("nvcc", "")
    driver = driver_cuda_version()
    if toolkit and driver and driver[0] < int(toolkit.split(".")[0]):
        return (
            f"built with CUDA {toolkit}, but the driver supports CUDA {driver[0]}.{driver[1]}; "
            f"update the driver, or build with a CUDA {driver[0]} toolkit"
        )
    return None


@functools.cache
def missing_code(capability: tuple[int, int]) -> str | None:
    """Say why the CUDA library has nothing to run on a compute capability, or None.

    Machine code serves later minor versions too, unless it is for one capability ("90a"). PTX
    serves all later capabilities, but the driver compiles that of its own CUDA version at most:
    unlike machine code, which any driver of the same major version takes. A list with anything but
    architectures ("native") is believed to be right.
    """
    build = build_info()
    parsed = [
        re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", name)
        for name in build.get("cuda_archs") or ()
    ]
    if not all(parsed) or not parsed:
        return None
    has_ptx = False
    for major, minor, family, kind in (match.groups() for match in parsed):
        code = int(major), int(minor)
        same_major = capability[0] == code[0]
        later = capability == code if family == "a" else capability >= code
        if later and same_major and kind != "-virtual":
            return None
        has_ptx = has_ptx or (later and kind != "-real" and (same_major or not family))
    card = f"compute capability {capability[0]}.{capability[1]}"
    if not has_ptx:
        return f"built for {', '.join(build['cuda_archs'])} only, not for {card}"
    driver = driver_cuda_version()
    if driver and driver < _version(build["nvcc"]):
        return (
            f"built without machine code for {card}, and the driver, for CUDA {driver[0]}."
            f"{driver[1]}, cannot compile the PTX of CUDA {build['nvcc']}; update the driver, or "
            "build with LOWBIT_CUDA_ARCHS=all"
        )
    return None


def _missing_library(backend: str) -> str:
    """Say why a library file is absent, from the build's own record when there is one."""
    reason = build_info().get("cuda_reason") if backend == "cuda" else None
    if reason and not build_info().get("cuda"):
        return f"not built: {reason}"
    where = Path(__file__).parent
    return f"{LIBRARIES[backend]} is not in {where}; pip install builds it (docs/building.md)"


def _load(backend: str) -> str | None:
    """Load one library and return None, or the reason why it is not there."""
    path = library_path(backend)
    if not path.is_file():
        return _missing_library(backend)
    obstacle = _torch_obstacle() or (_cuda_obstacle() if backend == "cuda" else None)
    if obstacle:
        return obstacle
    try:
        torch.ops.load_library(str(path))
    except Exception as error:
        # Any failure leaves lowbit usable: a missing symbol (OSError), a second copy of the library
        # (RuntimeError). torch keeps the loader's message, the useful one, as the cause.
        return f"{path.name} did not load: {error.__cause__ or error}"
    return None


for _backend in LIBRARIES:
    if (_reason := _load(_backend)) is not None:
        load_errors[_backend] = _reason
