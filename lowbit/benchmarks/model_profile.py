"""Where the GPU's time goes in one training step: kernels by class, from torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

# The first class with a word that occurs in the kernel's name; what matches none is elementwise.
CLASSES = {
    "lowbit": ("lowbit::", "nf4_", "_lora_", "silu_mul_", "rotary_kernel"),
    "bitsandbytes": ("kdequantizeblockwise", "kquantizeblockwise", "kgemm_4bit", "optimizer32bit"),
    "attention": ("flash", "fmha", "attention", "cudnn_generated", "sdpa"),
    "GEMM": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "cublas"),
    "copies": ("memcpy", "memset", "copy_kernel", "catarray", "bfloat16tofloat", "float_to_bf"),
}
OTHER = "elementwise"
SHOWN = 14  # kernels in the list of the longest


def kernel_class(name: str) -> str:
    lower = name.lower()
    for kind, words in CLASSES.items():
        if any(word in lower for word in words):
            return kind
    return OTHER


@dataclass
class Profile:
    """Milliseconds of one step by class, launches, and the longest kernels."""

    wall_ms: float
    classes: dict[str, float] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    kernels: list[tuple[str, int, float]] = field(default_factory=list)  # (name, launches, ms)

    @property
    def busy_ms(self) -> float:
        return sum(self.classes.values())

    def lines(self) -> list[str]:
        parts = [f"{kind} {ms:.1f} ({self.launches[kind]})" for kind, ms in self.classes.items()]
        total = sum(self.launches.values())
        head = (
            f"GPU busy {self.busy_ms:.1f} of {self.wall_ms:.1f} ms under the profiler, "
            f"{total} launches; ms (launches): {', '.join(parts)}"
        )
        return [head, *(f"{ms:8.2f} ms {n:>6} x {name[:110]}" for name, n, ms in self.kernels)]


def collect(events: list[tuple[str, float]], wall_ms: float) -> Profile:
    """Sum up kernels: (name, microseconds) of each launch."""
    profile = Profile(wall_ms)
    by_name: dict[str, list[float]] = {}
    for name, us in events:
        by_name.setdefault(name, []).append(us / 1e3)
    for name, times in by_name.items():
        kind = kernel_class(name)
        profile.classes[kind] = profile.classes.get(kind, 0.0) + sum(times)
        profile.launches[kind] = profile.launches.get(kind, 0) + len(times)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:SHOWN]
    profile.kernels = [(name, len(times), sum(times)) for name, times in longest]
    profile.classes = dict(sorted(profile.classes.items(), key=lambda item: -item[1]))
    return profile


def profile_step(step: Callable[[], object]) -> Profile:
    """Run a step under the profiler, which records the GPU only."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
    events = [
        (event.name, event.time_range.elapsed_us())
        for event in trace.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return collect(events, begin.elapsed_time(end))
