"""A row of `lowbit bench linear` with figures that are easy to follow."""

from lowbit.benchmarks import records


def make_row(impl: str, us: float, M: int = 16, layer: str = "q8b", **more) -> records.Row:
    fields = {"floor_us": 4.0, "layer": layer, "timing": "graph", "flops": 8e8, "bytes": 1e7}
    N = K = {"q8b": 4096, "kv8b": 1024}[layer]
    return records.Row(
        "lora_linear", M, N, K, 16, "bf16", impl, us, 0.9 * us, 1.2 * us, **fields | more
    )
