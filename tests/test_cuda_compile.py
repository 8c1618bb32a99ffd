"""The CUDA sources compile, spill nothing, and register the operators' schemas: no GPU needed."""

import importlib.util
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sass
import torch
from torch.utils.cpp_extension import include_paths

from lowbit import ops

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [p for p in sorted((ROOT / "csrc" / "cuda").glob("*")) if p.suffix in (".cu", ".cpp")]
TORCH = Path(torch.__file__).parent

# As CMakeLists.txt sets them.
DEFINITIONS = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
ARCHITECTURES = {"sm_80": "compute_80", "sm_90a": "compute_90a"}

# Bytes that a thread may spill. AdamW with 8-bit state is fastest with three CTAs per SM, 3.8 ms
# against 4.3 with two (bench/NOTES.md), and then spills a few values for fp16 and fp32 parameters.
SPILLS = {"optimizer.cu": 24}

# The part of libtorch_cuda.so's C ABI that lowbit needs; a CPU build of torch does not have it.
STAND_IN = """extern "C" {
int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
int aoti_torch_cuda_caching_allocator_raw_alloc(unsigned long, void**) { return 1; }
int aoti_torch_cuda_caching_allocator_raw_delete(void*) { return 1; }
}
"""


def _nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_nvcc() is None, reason="nvcc is neither on PATH nor in /usr/local/cuda"),
    pytest.mark.skipif(not SOURCES, reason="no csrc/cuda: the tests run outside of a checkout"),
]


def _run(*command) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _architectures(source: Path) -> list[str]:
    """All, or the one that a name such as nf4_lora_matmul_sm90.cu ends in."""
    family = re.search(r"_sm(\d+)$", source.stem)
    if family is None or family[1] == "80":
        return list(ARCHITECTURES)
    return [arch for arch in ARCHITECTURES if arch == f"sm_{family[1]}a"]


def _compile(source: Path, folder: Path) -> str:
    hidden = "-fvisibility=hidden"  # as CMake sets it: no warning about types that are hidden
    flags = ["-O3", "-std=c++17", f"-Xcompiler=-fPIC,-Wall,-Wextra,{hidden}", *DEFINITIONS]
    flags += [f"-I{ROOT / 'csrc'}", *(f"-isystem={path}" for path in include_paths())]
    if source.suffix == ".cu":
        flags += ["-Xptxas=-v"]
        for arch in _architectures(source):
            flags += [f"-gencode=arch={ARCHITECTURES[arch]},code={arch}"]
    return _run(_nvcc(), *flags, "-c", source, "-o", folder / f"{source.stem}.o")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """(folder with the objects, {source: what the compiler said})."""
    folder = tmp_path_factory.mktemp("cuda")
    with ThreadPoolExecutor(2) as pool:
        logs = pool.map(lambda source: _compile(source, folder), SOURCES)
        return folder, dict(zip(SOURCES, logs, strict=True))


@pytest.fixture(scope="module")
def library(build):
    """The library, linked against a stand-in for libtorch_cuda.so and nothing left undefined."""
    folder, _ = build
    (folder / "stand_in.cpp").write_text(STAND_IN)
    stand_in = folder / "libtorch_cuda.so"
    shared = [_nvcc(), "-shared", "-Xcompiler=-fPIC"]
    _run(
        *shared,
        "-cudart=none",
        folder / "stand_in.cpp",
        "-o",
        stand_in,
        f"-Xlinker=-soname={stand_in.name}",
    )
    objects = [folder / f"{source.stem}.o" for source in SOURCES]
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", stand_in, f"-Xlinker=-rpath={folder}"]
    out = folder / "_C_cuda.so"
    _run(*shared, "-cudart=static", *objects, *libraries, "-Xlinker=-z,defs", "-o", out)
    return out


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_no_warnings_and_spills(build, source):
    log = build[1][source]
    assert "warning" not in log, log
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spills) > 0 or source.suffix != ".cu", log
    allowed = SPILLS.get(source.name, 0)
    assert all(int(stores) <= allowed and int(loads) <= allowed for stores, loads in spills), log


def test_schemas_equal_those_of_the_public_operations(library):
    """In a process of its own: a library can be loaded once only, and pytest's may have its own."""
    script = (
        "import sys, torch; torch.ops.load_library(sys.argv[1]); "
        "print(*(getattr(torch.ops.lowbit_cuda, name).default._schema for name in sys.argv[2:]), "
        "sep='\\n')"
    )
    names = ("quantize_4bit", "dequantize_4bit", "dequantize_4bit_out")
    quantize, dequantize, window = _run(sys.executable, "-c", script, library, *names).splitlines()
    for name, schema in (("quantize_4bit", quantize), ("dequantize_4bit", dequantize)):
        expected = ops.SCHEMAS[name]
        # Results are named in lowbit:: only.
        unnamed = re.sub(r"(?<=Tensor) \w+(?=[,)][^>]*$)", "", expected)
        assert schema == f"lowbit_cuda::{name}{unnamed}"
    weight = ops.SCHEMAS["dequantize_4bit"].split(", ScalarType")[0]
    tail = ", int row0, Tensor(a!) out, int column0=0) -> ()"
    assert window == f"lowbit_cuda::dequantize_4bit_out{weight}{tail}"


def _cuobjdump() -> str | None:
    """From PATH or the toolkit, else the one that triton brings."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    spec = None if found else importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return found
    return shutil.which(
        "cuobjdump", path=str(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    )


# Kernels that wait only if they come first in a call, where what they read is there already, and
# optimizer steps, which follow one another: they wait at their end.
WAITS_UNDER_A_CONDITION = (
    "nf4_lora_matmul_mid_kernel", "nf4_lora_matmul_dx_kernel", "optimizer_step_kernel",
)  # fmt: skip


@pytest.mark.skipif(_cuobjdump() is None, reason="there is no cuobjdump")
def test_nothing_is_read_before_the_wait_for_the_kernel_in_front(build):
    """ptxas moves __ldg in front of griddepcontrol.wait where no branch or barrier is between."""
    folder, _ = build
    waiting, problems = set(), []
    for source in SOURCES:
        if source.suffix != ".cu":
            continue
        listing = _run(_cuobjdump(), "-sass", folder / f"{source.stem}.o")
        for name, instructions in sass.functions(listing).items():
            if not any(sass.WAIT in text for text in instructions.values()):
                continue
            waiting.add(name)
            if any(kernel in name for kernel in WAITS_UNDER_A_CONDITION):
                continue
            problems += [f"{name}: {hit}" for hit in sass.accesses_before_wait(instructions)]
    assert len(waiting) > 50, "the kernels' waits were not found"
    assert not problems, "\n".join(problems[:20])


# Frees the stage before, whose words have gone through products that were waited for.
FREES_AN_EARLIER_STAGE = "nf4_lora_matmul_small_kernel"


@pytest.mark.skipif(_cuobjdump() is None, reason="there is no cuobjdump")
def test_loads_have_ended_where_shared_memory_is_freed(build):
    """ptxas does not wait for loads in front of an arrival (barrier_arrive_behind)."""
    folder, _ = build
    kernels, problems = 0, []
    for source in SOURCES:
        if not source.stem.endswith("_sm90"):
            continue
        listing = _run(_cuobjdump(), "-sass", folder / f"{source.stem}.o")
        kernels += listing.count("SYNCS.ARRIVE") > 0
        for name, hits in sass.loads_under_way(listing).items():
            if FREES_AN_EARLIER_STAGE not in name:
                problems += [f"{name}: {hit}" for hit in hits]
    assert kernels >= 6, "the kernels' barriers were not found"
    assert not problems, "\n".join(problems[:20])


def test_the_scan_finds_a_load_that_is_not_waited_for():
    listing = """
        Function : waits_for_one
        /*0000*/  LDS.128 R4, [R2] ;          /* 0x0000000002047984 */
                                              /* 0x000e220000000c00 */
        /*0010*/  LDS.128 R8, [R2+0x10] ;     /* 0x0000000002087984 */
                                              /* 0x000e620000000c00 */
        /*0020*/  IADD3 R4, R4, R5, RZ ;      /* 0x0000000504047210 */
                                              /* 0x001fe20007ffe0ff */
        /*0030*/  SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R3], RZ ;  /* 0x000000ff03ff79a7 */
                                              /* 0x000fe20008100000 */
        Function : waits_for_both
        /*0000*/  LDSM.16.M88.4 R4, [R2] ;    /* 0x000000000204783b */
                                              /* 0x000e220000000200 */
        /*0010*/  IADD3 R4, R4, R5, RZ ;      /* 0x0000000504047210 */
                                              /* 0x001fe20007ffe0ff */
        /*0020*/  SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R3], RZ ;  /* 0x000000ff03ff79a7 */
                                              /* 0x000fe20008100000 */
    """
    assert sass.loads_under_way(listing) == {
        "waits_for_one": [
            "0x0030: SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R3], RZ behind LDS.128 R8, [R2+0x10]"
        ],
        "waits_for_both": [],
    }


def test_the_scan_finds_a_load_before_a_wait():
    listing = """
        Function : early
        /*0000*/  LDG.E.CONSTANT R2, [R4] ;
        /*0010*/  ACQBULK ;
        /*0020*/  LDG.E R3, [R4] ;
        /*0030*/  EXIT ;
        Function : behind_a_branch
        /*0000*/  @P0 BRA 0x30 ;
        /*0010*/  ACQBULK ;
        /*0020*/  EXIT ;
        /*0030*/  STG.E [R4], R2 ;
        /*0040*/  EXIT ;
        Function : late
        /*0000*/  BRA `(.L_1) 0x20 ;
        /*0010*/  LDG.E R3, [R4] ;
        /*0020*/  ACQBULK ;
        /*0030*/  LDG.E R3, [R4] ;
        /*0040*/  BRA 0x10 ;
    """
    found = {
        name: sass.accesses_before_wait(code) for name, code in sass.functions(listing).items()
    }
    assert found == {
        "early": ["0x0: LDG.E.CONSTANT R2, [R4]"],
        "behind_a_branch": ["0x30: STG.E [R4], R2"],
        "late": [],
    }
