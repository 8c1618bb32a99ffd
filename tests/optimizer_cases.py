"""Parameters, gradients and classes that the tests of lowbit.optim share."""

import torch

import lowbit.optim as optim

CLASSES = [
    optim.AdamW8bit,
    optim.PagedAdamW,
    optim.PagedAdamW8bit,
    optim.PagedLion,
    optim.PagedLion8bit,
]
# Sizes, and why: rows of odd length; one block; one element; many chunks; a short last block;
# nothing; one more than a block.
SHAPES = [(300, 7), (256,), (1,), (4096, 30), (5000,), (0, 3), (257,)]


def make_parameters(shapes=SHAPES, dtype=torch.float32, device="cpu"):
    """The same values on every device."""
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return [torch.nn.Parameter(v.to(dtype).to(device)) for v in values]


def give_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype).to(p.device)
