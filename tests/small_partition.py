"""Runs in a process of its own for test_cuda_room.py: products on 8 SMs of the device.

Prints for each product how far it is from that of the whole device, relative and as a norm. A
kernel whose CTAs wait for others that cannot start would hang.
"""

import torch

import lowbit
from lowbit import dispatch

BF16 = torch.bfloat16
SMS = 8  # the fewest that a green context can have, and a cluster of eight needs

# kernel, M, N, K, r. Of the kernel for some hundred tokens, as an H100 divides them: tiles in six
# parts, of which four find room at a time, behind more CTAs that project than SMs; in eight parts,
# without an adapter and behind a projection of its own; whole tiles; whole rounds, then parts of
# equal and of unequal length.
PRODUCTS = [
    ("nf4_lora_gemv", 1, 4096, 4096, 16),
    ("nf4_lora_matmul_small", 16, 4096, 4096, 16),
    ("nf4_lora_matmul_small", 2, 14336, 4096, 0),
    ("nf4_lora_matmul_small", 64, 4096, 14336, 64),
    ("nf4_lora_matmul_portable", 16, 4096, 4096, 16),
    ("nf4_lora_matmul_mid", 512, 1024, 4096, 16),
    ("nf4_lora_matmul_mid", 256, 1024, 4096, 0),
    ("nf4_lora_matmul_mid", 100, 1280, 4096, 64),
    ("nf4_lora_matmul_mid", 200, 14336, 4096, 16),
    ("nf4_lora_matmul_mid", 1536, 4096, 4096, 16),
    ("nf4_lora_matmul_mid", 512, 14336, 4096, 16),
    # dx: two and four pairs of CTAs share the N of a tile, the givers first.
    ("nf4_lora_backward", 100, 4104, 1088, 0),
    ("nf4_lora_backward", 256, 14336, 4096, 0),
    ("nf4_lora_backward", 200, 9728, 8832, 0),
]


def multiply(kernel, x, q, adapter):
    if kernel == "nf4_lora_backward":
        return torch.ops.lowbit_cuda.nf4_lora_matmul_dx(x, *q.args(), None)
    with torch.no_grad(), dispatch.force(f"cuda:{kernel}"):
        return lowbit.lora_matmul(x, q, *adapter) if adapter else lowbit.matmul(x, q)


def refuses_what_needs_all_sms(weight):
    """Whether the context is in force: a cooperative launch as large as the device is an error."""
    try:
        lowbit.quantize(weight)
    except RuntimeError as error:
        return "cooperative" in str(error)
    return False


def record(arguments):
    """The product, run by a graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = multiply(*arguments)
    graph.replay()
    return y


def main():
    from torch.cuda.green_contexts import GreenContext

    torch.manual_seed(0)
    cases = []
    for kernel, M, N, K, r in PRODUCTS:
        q = lowbit.quantize(torch.randn(N, K, device="cuda", dtype=BF16))
        columns = N if kernel == "nf4_lora_backward" else K  # of x, or of dy
        x = torch.randn(M, columns, device="cuda", dtype=BF16)
        A, B = (torch.randn(s, device="cuda", dtype=BF16) / 8 for s in ((r, K), (N, r)))
        arguments = (kernel, x, q, (A, B, 2.0) if r else ())
        cases.append((arguments, multiply(*arguments)))
    weight = torch.randn(4096, 4096, device="cuda", dtype=BF16)
    torch.cuda.synchronize()
    context = GreenContext.create(num_sms=SMS, device_id=0)
    context.set_context()
    for product, (arguments, y) in zip(PRODUCTS, cases, strict=True):
        first, again, recorded = multiply(*arguments), multiply(*arguments), record(arguments)
        torch.cuda.synchronize()
        assert torch.equal(first, again), product
        assert torch.equal(first, recorded), product
        print(*product, ((first.float() - y.float()).norm() / y.float().norm()).item(), flush=True)
        assert refuses_what_needs_all_sms(weight), product
    context.pop_context()


if __name__ == "__main__":
    main()
