"""Inputs of one layer for the tests of lowbit.lora_matmul."""

import torch

import lowbit


def problem(
    shape, dtype, device, *, bias=True, vector=False, double_quant=True, layout="rows", blocksize=64
):
    """x, lora_A, lora_B, bias, dy, w and scaling by name; `shape`: M, N, K, r."""
    M, N, K, r = shape
    tensors = {
        "x": torch.randn(M, K),
        "lora_A": torch.randn(r, K) / K**0.5,
        "lora_B": torch.randn(N, r) / r**0.5,
        "bias": torch.randn(N) if bias else None,
        "dy": torch.randn(M, N),
    }
    out = {k: None if t is None else t.to(dtype).to(device) for k, t in tensors.items()}
    weight = (torch.randn(N, K) / K**0.5).to(device)
    options = {"double_quant": double_quant, "layout": layout, "blocksize": blocksize}
    out["w"] = lowbit.quantize(weight, **options).to(dtype=dtype)
    out["scaling"] = torch.rand(r, device=device) + 0.5 if vector else 2.0
    return out
