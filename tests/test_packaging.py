"""What a build leaves behind: wheel, source distribution, libraries, editable install."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from lowbit import _info, _library
from lowbit._version import __version__

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(_library.__file__).parent
LIBRARIES = sorted(PACKAGE.glob("_C_*.so"))

in_checkout = pytest.mark.skipif(
    PACKAGE != ROOT / "lowbit", reason="lowbit is imported from elsewhere, not from this checkout"
)
can_build = pytest.mark.skipif(
    not (shutil.which("cmake") or importlib.util.find_spec("cmake"))
    or not (shutil.which("ninja") or importlib.util.find_spec("ninja"))
    or not importlib.util.find_spec("setuptools"),
    reason="cmake, ninja or setuptools is not installed (make venv)",
)
has_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are not installed")
has_libraries = pytest.mark.skipif(not LIBRARIES, reason="no compiled library was built")


def tool(name: str) -> str:
    """cmake or ninja as setup.py finds it: this environment's first."""
    return shutil.which(name, path=os.path.dirname(sys.executable)) or shutil.which(name)


def run(*command, cwd=ROOT, env=None) -> subprocess.CompletedProcess:
    """Run a command; a failure shows its output."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env or dict(os.environ),
        capture_output=True,
        text=True,
        timeout=900,
    )
    return done


def succeed(*command, **options) -> str:
    done = run(*command, **options)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this checkout, with the settings of the last build so that objects are reused."""
    built = _library.build_info()
    settings = {
        "LOWBIT_CUDA": "1" if built.get("cuda") else "0",
        "LOWBIT_CUDA_ARCHS": ";".join(built.get("cuda_archs", [])) or "default",
    }
    directory = tmp_path_factory.mktemp("wheel")
    flags = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", directory]
    succeed(
        sys.executable, "-m", "pip", "wheel", *flags, ROOT, cwd=directory, env=os.environ | settings
    )
    (path,) = directory.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked source distribution."""
    directory = tmp_path_factory.mktemp("sdist")
    succeed(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", directory)
    (archive,) = directory.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        # Python 3.11.3 and older know no filters.
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        tar.extractall(directory, **safely)
    (unpacked,) = (path for path in directory.iterdir() if path.is_dir())
    return unpacked


# ---- wheel ---------------------------------------------------------------------------------------


@in_checkout
@can_build
def test_wheel_installs_nothing_but_lowbit(wheel):
    assert re.fullmatch(r"lowbit-[^-]+-py3-none-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"lowbit", f"lowbit-{__version__}.dist-info"}


@in_checkout
@can_build
def test_wheel_holds_every_module_and_library(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"lowbit/{path.name}" for path in LIBRARIES} | {"lowbit/_build_info.json"}
    expected.add("lowbit/py.typed")  # type checkers read the hints only where this file is
    for source, target in (
        (ROOT / "lowbit", "lowbit"),
        (ROOT / "kernels/triton", "lowbit/kernels"),
    ):
        expected |= {f"{target}/{path.relative_to(source)}" for path in source.rglob("*.py")}
    data = ROOT / "lowbit/cli/demo_data"
    expected |= {f"lowbit/cli/demo_data/{path.name}" for path in data.glob("*")}
    assert expected - names == set()
    modules = {name for name in names if name.endswith((".py", ".so"))}
    assert modules - expected == set(), "a leftover of an earlier build was packed"


@in_checkout
@can_build
def test_wheel_works_unpacked(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import lowbit, lowbit._library, importlib.util, json;"
        "kernels = importlib.util.find_spec('lowbit.kernels').origin;"
        "print(json.dumps([lowbit.__file__, kernels, lowbit._library.load_errors]))"
    )
    output = succeed(
        sys.executable, "-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}
    )
    package, kernels, errors = json.loads(output)
    assert package == str(tmp_path / "lowbit/__init__.py")
    assert kernels == str(tmp_path / "lowbit/kernels/__init__.py")
    assert errors == _library.load_errors


@in_checkout
@can_build
def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    directory = f"lowbit-{__version__}.dist-info"
    metadata = archive.read(f"{directory}/METADATA").decode()
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Dist: torch>=2.10\n" in metadata
    assert "lowbit = lowbit.cli:main" in archive.read(f"{directory}/entry_points.txt").decode()
    assert "The lowbit authors" in archive.read(f"{directory}/licenses/LICENSE").decode()


# ---- source distribution and CMake's settings ----------------------------------------------------


@in_checkout
@can_build
def test_sdist_holds_what_a_build_and_the_tests_need(sdist):
    files = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    for tree in ("csrc", "kernels/triton", "tests", "build_support"):
        wanted = {
            str(path.relative_to(ROOT))
            for path in (ROOT / tree).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert wanted - files == set()
    assert {"CMakeLists.txt", "Makefile", "LICENSE", "README.md", ".ci/run"} <= files
    compiled = {name for name in files if name.endswith((".so", ".pyc", "_build_info.json"))}
    assert compiled == set()


def configure(source: Path, build: Path, *defines: str, **settings: str):
    command = [tool("cmake"), "-G", "Ninja", "-S", source, "-B", build]
    make = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
    environment = os.environ | {"LOWBIT_PYTHON": sys.executable} | settings
    return run(*command, make, *defines, cwd=source, env=environment)


@in_checkout
@can_build
def test_sdist_builds_without_cuda_when_told_so(sdist, tmp_path):
    stale = sdist / "lowbit/_C_cuda.so"
    stale.write_bytes(b"")
    done = configure(sdist, tmp_path, LOWBIT_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "CUDA library not built: switched off with LOWBIT_CUDA=0" in done.stdout
    assert not stale.exists(), "a CUDA library of an earlier build would still be loaded"
    record = json.loads((sdist / "lowbit/_build_info.json").read_text())
    assert record["cuda"] is False
    assert record["cuda_archs"] == []
    # That the sources compile, the checkout has shown; here each of them is in the plan.
    plan = json.loads((tmp_path / "compile_commands.json").read_text())
    planned = {Path(entry["file"]).name for entry in plan}
    assert planned >= {path.name for path in (ROOT / "csrc/cpu").glob("*.cpp")}


@in_checkout
@can_build
def test_cuda_demanded_without_nvcc_is_an_error(sdist, tmp_path):
    if not list((sdist / "csrc/cuda").glob("*.cu")):
        pytest.skip("no CUDA sources")
    hidden = "-DLOWBIT_NVCC:STRING="  # set but empty: CMake then does not look for it
    done = configure(sdist, tmp_path / "demanded", hidden, LOWBIT_CUDA="1")
    assert done.returncode != 0
    assert re.search(r"LOWBIT_CUDA=1, but\s+nvcc was not found", done.stderr)
    done = configure(sdist, tmp_path / "automatic", hidden, LOWBIT_CUDA="auto")
    assert done.returncode == 0
    assert "CUDA library not built: nvcc was not found" in done.stdout
    done = configure(sdist, tmp_path / "mistyped", LOWBIT_CUDA="yes")
    assert "LOWBIT_CUDA must be 0, 1 or auto, got yes" in done.stderr


@in_checkout
def test_build_finds_the_torch_that_runs_here():
    output = succeed(sys.executable, ROOT / "build_support/find_torch.py")
    directory, version, cuda = output.split("\n")[:3]
    assert Path(directory) == Path(torch.__file__).parent
    assert version == torch.__version__
    assert cuda == (torch.version.cuda or "none")


# ---- compiled libraries --------------------------------------------------------------------------

# Mangled C++ names of libtorch's own namespaces. The stable ABI is plain C: none may be undefined.
UNSTABLE = re.compile(r"_Z(?:T[ISV])?N?K?(?:2at|3c10|5torch|6caffe2)\d")


@has_libraries
@has_nm
@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.name)
def test_library_uses_only_the_stable_abi(path):
    undefined = succeed("nm", "-D", "--undefined-only", path).split()
    assert [name for name in undefined if UNSTABLE.match(name)] == []
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in undefined)
    assert [name for name in undefined if name.startswith(("Py", "_Py"))] == []


# What lowbit/memory.py and lowbit/backends/cuda_direct.py call through ctypes (paged_memory.h and
# direct.cpp in csrc/cuda).
C_INTERFACE = {
    "_C_cuda.so": {
        "lowbit_advise",
        "lowbit_backward",
        "lowbit_copy",
        "lowbit_error_text",
        "lowbit_last_location",
        "lowbit_new_tensor",
        "lowbit_pages",
        "lowbit_prefetch",
        "lowbit_product",
    }
}


@has_libraries
@has_nm
@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.name)
def test_library_exports_nothing_but_its_c_interface(path):
    exported = succeed("nm", "-D", "--defined-only", path).split()
    assert {name for name in exported if "lowbit" in name} == C_INTERFACE.get(path.name, set())


@has_libraries
@pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils are not installed")
@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.name)
def test_library_finds_torch_beside_itself(path):
    dynamic = succeed("readelf", "-d", path)
    needed = set(re.findall(r"NEEDED.*\[(\S+?)\]", dynamic))
    assert re.findall(r"(?:RPATH|RUNPATH).*\[(.*)\]", dynamic) == ["$ORIGIN/../torch/lib"]
    assert "libtorch_cpu.so" in needed
    assert ("libtorch_cuda.so" in needed) == (path.name == "_C_cuda.so")
    # cudart is linked statically, so that torch may bring any CUDA 12 or 13 runtime of its own
    assert not [name for name in needed if name.startswith(("libcudart", "libpython", "libc10"))]


def test_build_record_agrees_with_the_libraries():
    built = _library.build_info()
    if not built:
        pytest.skip("nothing was built")
    assert (PACKAGE / "_C_cuda.so").exists() == built["cuda"]
    assert built["cpu_levels"][0] == "generic"
    assert built["cuda_reason"]


# ---- installed package ---------------------------------------------------------------------------


def test_version_is_declared_once():
    try:
        installed = importlib.metadata.version("lowbit")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("lowbit is on the path but not installed")
    assert installed == __version__


def test_kernels_folder_is_lowbit_kernels_and_shadows_nothing():
    code = (
        "import importlib.util;"
        "spec = importlib.util.find_spec('kernels');"
        "print(importlib.util.find_spec('lowbit.kernels').origin, spec and spec.origin)"
    )
    done = run(sys.executable, "-c", code)  # from the repository root, which is then on sys.path
    if "NoneType" in done.stderr:
        pytest.skip("lowbit is on the path but not installed: lowbit.kernels needs an install")
    mapped, top = done.stdout.split()
    assert Path(mapped).parent in (ROOT / "kernels/triton", PACKAGE / "kernels")
    assert not top.startswith(str(ROOT))


# ---- loading -------------------------------------------------------------------------------------


def test_import_works_without_any_library(tmp_path):
    """A bare copy of the sources, as on a machine that could build nothing."""
    shutil.copytree(
        PACKAGE,
        tmp_path / "lowbit",
        ignore=shutil.ignore_patterns("_C_*", "_build_info.json", "__pycache__"),
    )
    code = (
        "import json, torch, lowbit, lowbit._library as library;"
        "w = lowbit.quantize(torch.ones(8, 64));"
        "y = lowbit.matmul(torch.ones(2, 64), w);"
        "assert y.shape == (2, 8);"
        "print(json.dumps([lowbit.__file__, library.load_errors, library.build_info()]))"
    )
    output = succeed(
        sys.executable, "-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}
    )
    package, errors, built = json.loads(output)
    assert Path(package).parent == tmp_path / "lowbit"
    assert built == {}
    for backend in ("cpu", "cuda"):
        assert f"_C_{backend}.so is not in" in errors[backend]


def test_a_broken_library_is_reported(monkeypatch, tmp_path):
    broken = tmp_path / "_C_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_library, "library_path", lambda backend: broken)
    assert re.match(r"_C_cpu\.so did not load: .*_C_cpu\.so", _library._load("cpu"))


def test_an_old_torch_is_reported(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert "need torch 2.10 or newer, this is 2.9.1" in _library._torch_obstacle()


@pytest.mark.parametrize(
    ("cuda", "hip", "driver", "reason"),
    [
        (None, None, None, "built without CUDA"),
        (None, "7.0", None, "a ROCm build"),
        ("12.8", None, (12, 8), r"built with CUDA 13\.0\.88, but the driver supports CUDA 12\.8"),
        ("13.0", None, (13, 0), None),
        ("13.0", None, None, None),  # no driver: the library loads, there is just no GPU
    ],
)
def test_cuda_obstacles(monkeypatch, cuda, hip, driver, reason):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(_library, "driver_cuda_version", lambda: driver)
    monkeypatch.setattr(_library, "build_info", lambda: {"nvcc": "13.0.88"})
    found = _library._cuda_obstacle()
    assert found is None if reason is None else re.search(reason, found)


@pytest.mark.parametrize(
    ("archs", "driver", "capability", "reason"),
    [
        ("80 90a-real", (13, 0), (8, 0), None),
        ("80 90a-real", (13, 0), (8, 9), None),  # a later minor version
        ("80 90a-real", (13, 0), (9, 0), None),  # machine code: an older driver takes it
        ("80 90a-real", (13, 0), (12, 0), r"the driver, for CUDA 13\.0, cannot compile the PTX of"),
        ("80 90a-real", (13, 2), (12, 0), None),
        ("80 90a-real", None, (12, 0), None),
        ("80 90a-real", (13, 0), (7, 5), r"not for compute capability 7\.5"),
        (
            "90a-real",
            (13, 2),
            (10, 0),
            r"built for 90a-real only, not for compute capability 10\.0",
        ),
        ("90a-real 80-virtual", (13, 2), (10, 0), None),
        ("86-real", (13, 2), (8, 0), r"not for compute capability 8\.0"),
        ("100f-real", (13, 2), (10, 3), None),  # a family's code runs on its later members
        ("100f-real", (13, 2), (12, 0), r"not for compute capability 12\.0"),
        ("native", (13, 0), (9, 0), None),  # not an architecture: believed
        ("", (13, 0), (12, 0), None),  # no record
    ],
)
def test_cards_without_code(monkeypatch, archs, driver, capability, reason):
    build = {"nvcc": "13.2.51", "cuda_archs": archs.split()}
    monkeypatch.setattr(_library, "build_info", lambda: build)
    monkeypatch.setattr(_library, "driver_cuda_version", lambda: driver)
    found = _library.missing_code.__wrapped__(capability)  # past the cache
    assert found is None if reason is None else re.search(reason, found)


# ---- lowbit info ---------------------------------------------------------------------------------


def test_report_is_complete_and_plain():
    report = json.loads(json.dumps(_info.report()))
    assert report["versions"]["torch"] == importlib.metadata.version("torch")
    assert report["cpu"]["levels"][0] == "generic"
    assert report["backends"]["reference"] is None
    for backend, reason in _library.load_errors.items():
        assert report["backends"][backend] == reason
    cpu = [entry for entry in report["operations"] if entry["device"] == "cpu"]
    assert {entry["operation"] for entry in cpu} == set(_info.dispatch.OPERATIONS)
    assert all(entry["backend"] and entry["reason"] for entry in cpu)
    assert len(report["cuda"]["gpus"]) == torch.cuda.device_count()


def test_report_survives_wrong_settings(monkeypatch):
    monkeypatch.setattr(_info.dispatch, "_environment", "quantum")
    report = _info.report()
    assert "LOWBIT_BACKEND must be one of" in report["forced"]
    assert all(entry["backend"] is None for entry in report["operations"])
