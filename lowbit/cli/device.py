"""Choose the device and the compute dtype, and say why a wished one is not there."""

from typing import Any

import torch

from .errors import CliError

# Instruction sets with which bfloat16 beats float32 on a CPU.
CPU_BF16_LEVELS = ("avx512_bf16", "amx")


def resolve_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. CliError if CUDA is wished and not available."""
    if name == "cuda" and not torch.cuda.is_available():
        if torch.version.cuda is None:
            raise CliError(
                f"--device cuda: this torch ({torch.__version__}) is built without CUDA; "
                "use --device cpu"
            )
        raise CliError(
            "--device cuda: torch sees no NVIDIA GPU with a working driver; use --device cpu"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the hardware multiplies it (Ampere, AVX-512 bf16), else float16
    on GPU, float32 on CPU.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return (
            torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        )
    return torch.bfloat16 if cpu_level() in CPU_BF16_LEVELS else torch.float32


def cpu_level() -> str:
    """Instruction set that the compiled CPU kernels use, "none" without them."""
    from lowbit import _library

    return torch.ops.lowbit_cpu.isa() if _library.available("cpu") else "none"


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """For instance `cuda (NVIDIA H100), bfloat16`."""
    name = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {name}"
    return f"CPU ({torch.get_num_threads()} threads, kernels: {cpu_level()}), {name}"


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, so that a clock read next is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device, sampled: int) -> Any:
    """Peak memory of the run: exact on a GPU, the largest sample on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else sampled
