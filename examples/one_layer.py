"""Train the adapter of one 4-bit linear layer.

A dense layer is quantized, then asked to behave like the same layer with a rank-4 change. Only the
adapter can learn: it finds the change, and the error of quantization remains.
"""

import torch

import lowbit.nn

torch.manual_seed(0)
N, K, RANK = 512, 1024, 4

dense = torch.nn.Linear(K, N)
change = torch.randn(N, RANK) @ torch.randn(RANK, K) / K
layer = lowbit.nn.QLoRALinear.from_linear(dense, r=RANK, alpha=RANK)
before = dense.weight.numel() * dense.weight.element_size()
after = layer.quantized_weight.nbytes
print(f"weight: {before:,} bytes -> {after:,} bytes ({8 * after / (N * K):.3f} bits per parameter)")

x = torch.randn(1024, K)
floor = (layer(x) - dense(x)).square().mean().item()
print(f"error of quantization alone: {floor:.5f}")

optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=3e-3)
for step in range(151):
    x = torch.randn(256, K)
    wanted = torch.nn.functional.linear(x, dense.weight + change, dense.bias).detach()
    loss = (layer(x) - wanted).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step:3}: error {loss.item():.5f}")

learned = layer.lora_B @ layer.lora_A * layer.scaling
print(f"distance to the change: {(learned - change).norm() / change.norm():.1%} of its size")
