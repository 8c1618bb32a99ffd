"""One adapted layer for the tests of the CUDA backend: its operands, and what the formulas say."""

import torch

import lowbit
from lowbit import reference
from lowbit.backends import cuda

GRADIENTS = ("dx", "d_lora_A", "d_lora_B", "d_bias", "d_lora_scaling")


class LayerCase:
    """Inputs of one product, and its results by the formulas in any precision."""

    def __init__(
        self, size, dtype, device, *, masters=False, vector=False, dropout_p=0.0, scaling=1.7,
        layout="rows", **quantize_options,
    ):  # fmt: skip
        M, N, K, r = size

        def randn(*shape):
            return torch.randn(shape).to(device)

        weight = randn(N, K) / K**0.5
        if layout == "dense":
            self.q = weight.to(dtype)
        else:
            self.q = lowbit.quantize(weight, layout=layout, **quantize_options)
        adapter = torch.float32 if masters else dtype
        self.x, self.dy = randn(M, K).to(dtype), randn(M, N).to(dtype)
        self.lora_A = (randn(r, K) / K**0.5).to(adapter)
        self.lora_B = randn(N, r).to(adapter)
        self.bias = randn(N).to(dtype)
        self.vector = torch.rand(r).to(device) + 0.5 if vector else None
        self.dropout_p, self.scaling, self.dtype = dropout_p, scaling, dtype
        self.seed = torch.tensor([1234567890123], device=device)

    def weight(self):
        if isinstance(self.q, torch.Tensor):
            return (self.q, None, None, None, None, None, *self.q.shape, 64, 256, True)
        return tuple(self.q.args())

    def forward(self):
        return cuda.lora_linear(
            self.x, *self.weight(), self.lora_A, self.lora_B, self.vector, self.scaling, self.bias,
            self.dropout_p, self.seed,
        )  # fmt: skip

    def backward_args(self, z, needs=(True,) * 5):
        return (
            self.dy, self.x, z, *self.weight(), self.lora_A, self.lora_B, self.vector, self.scaling,
            self.dropout_p, self.seed, *needs,
        )  # fmt: skip

    def backward(self, z, needs=(True,) * 5, **options):
        return cuda.lora_linear_backward(*self.backward_args(z, needs), **options)

    def formulas(self, dtype):
        """reference.py in `dtype`, on operands rounded to the activations' dtype."""
        weight = cuda.dequantize_4bit(*self.weight(), self.dtype).to(dtype)
        x, dy, lora_A, lora_B = (
            t.to(self.dtype).to(dtype) for t in (self.x, self.dy, self.lora_A, self.lora_B)
        )
        rest = (weight, lora_A, lora_B, self.vector, self.scaling)
        y, z = reference.lora_linear(x, *rest, self.bias.to(dtype), self.dropout_p, self.seed)
        gradients = reference.lora_linear_backward(dy, x, z, *rest, self.dropout_p, self.seed)
        return y, z, *gradients
