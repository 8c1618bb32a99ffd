"""What `lowbit info` prints: versions, processor, GPUs, backends, the backend of each operation.

`report` returns plain dicts, lists and strings, ready for json.dumps. It raises nothing: a report
from a broken installation is the one that is needed most.
"""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

from . import _library, dispatch
from ._version import __version__

PACKAGES = ("torch", "triton", "numpy", "safetensors", "transformers", "peft", "bitsandbytes")

# Instruction-set levels of the CPU backend and the flags of /proc/cpuinfo each adds to the one
# before (csrc/cpu/isa.h).
CPU_LEVELS = {
    "generic": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx512_bf16": ("avx512_bf16",),
    "amx": ("amx_tile", "amx_bf16"),
}


def report() -> dict:
    """Describe this installation and this machine.

    Returns:
        dict with the keys
        versions: package name -> version or None; also lowbit, python and system.
        cpu: model, threads torch uses, levels the processor has, level_in_use (None without the
            library).
        cuda: torch's CUDA version, the driver's, and gpus, a list of name, capability,
            memory_bytes, multiprocessors.
        build: the record left by the build (lowbit._library.build_info), {} when nothing was
            compiled.
        backends: name -> None when it can run here, else the reason why it cannot.
        forced: the backend forced by LOWBIT_BACKEND or dispatch.force, or None.
        operations: list of device, operation, dtype, min_tokens, backend and reason, in the order
            of the table.
    """
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "cuda": _cuda(),
        "build": _library.build_info(),
        "backends": {name: _reason(name) for name in dispatch.BACKENDS},
        "forced": _forced(),
        "operations": _operations(),
    }


def _reason(backend: str) -> str | None:
    """Why a backend can run on none of the GPUs, or not at all; None if it can."""
    why = dispatch.unavailable(backend)
    if why is not None or backend != "cuda":
        return why
    gpus = (torch.device("cuda", i) for i in range(torch.cuda.device_count()))
    reasons = [dispatch.obstacle(backend, gpu) for gpu in gpus]
    return reasons[0] if reasons and None not in reasons else None


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "lowbit": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _cpu() -> dict:
    fields = _cpuinfo()
    flags = set(fields.get("flags", "").split())
    levels = []
    for level, needed in CPU_LEVELS.items():
        if not flags.issuperset(needed):
            break
        levels.append(level)
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "levels": levels,
        "level_in_use": _level_in_use(),
    }


def _level_in_use() -> str | None:
    try:
        return torch.ops.lowbit_cpu.isa() if _library.available("cpu") else None
    except RuntimeError as error:  # LOWBIT_CPU_ISA holds an unknown name
        return str(error).splitlines()[0]


def _cpuinfo() -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo, {} where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cuda() -> dict:
    driver = _library.driver_cuda_version()
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return {
        "torch": torch.version.cuda,
        "driver": f"{driver[0]}.{driver[1]}" if driver else None,
        "gpus": gpus,
    }


def _forced() -> str | None:
    try:
        return dispatch.forced()
    except ValueError as error:  # LOWBIT_BACKEND holds an unknown name
        return str(error)


def _operations() -> list[dict]:
    """Ask the dispatch table for every device, operation and range of M."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [
        choice
        for device in devices
        for operation in dispatch.OPERATIONS
        for choice in _choices(operation, device)
    ]


# Double-quantized layers of language models: every kernel of the table serves them.
_USUAL_LAYER = dispatch.Layer(N=4096, K=4096, blocksize=64, r=16)


def _choices(
    operation: str, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> list[dict]:
    """Return one entry for each range of M that the table treats differently, smallest M first."""
    choices: list[dict] = []
    for tokens in sorted({row.tokens[0] for row in dispatch.TABLE}):
        try:
            row = dispatch.choose(operation, device, dtype, tokens, _USUAL_LAYER)
            backend, reason = row.backend, row.reason
        except Exception as error:
            backend, reason = None, str(error)
        if choices and (choices[-1]["backend"], choices[-1]["reason"]) == (backend, reason):
            continue
        choices.append(
            {
                "device": str(device),
                "operation": operation,
                "dtype": str(dtype).removeprefix("torch."),
                "min_tokens": tokens,
                "backend": backend,
                "reason": reason,
            }
        )
    return choices
