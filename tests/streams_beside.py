"""Products of eight random layers, each on a stream of its own, by kernels whose CTAs wait for each
other or for a kernel beside them; run by test_cuda_room.py in a process of its own.

Prints a line per round: how many results have other bits than those of the layer alone. Until
2026-11 two kernels could each hold SMs that the other one waited for, after 9 of these rounds or
before (H200).
"""

import random

import torch

import lowbit
from lowbit import dispatch

TOKENS = {
    "nf4_lora_matmul_large": (2304, 3000, 4096),
    "nf4_lora_matmul_mid": (256, 700, 1024, 3000),
    "nf4_lora_matmul_small": (2, 16, 64),
    "nf4_lora_backward": (64, 256, 700),
}
KERNELS = tuple(TOKENS)
ROUNDS, CALLS, RANK = 40, 25, 16


def layer(kernel: str, draw: random.Random):
    """A call of the layer's product, or of its backward pass."""
    M, N, K = draw.choice(TOKENS[kernel]), 64 * draw.randint(8, 80), 64 * draw.randint(8, 70)

    def values(*shape):
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda") * shape[-1] ** -0.5

    x, w, A, B = values(M, K), lowbit.quantize(values(N, K)), values(RANK, K), values(N, RANK)

    backward = (values(M, N), x, x @ A.t(), *w.args(), A, B, None, 1.5, 0.0, None)
    needs = True, True, True, True, False

    def call() -> tuple[torch.Tensor, ...]:
        with dispatch.force(f"cuda:{kernel}"):
            if kernel != "nf4_lora_backward":
                return (lowbit.lora_matmul(x, w, A, B, 1.5),)
            arguments = (*backward, *needs)
            return dispatch.select("lora_linear_backward", arguments)(*arguments)[:4]

    return call


@torch.no_grad()
def main() -> None:
    draw = random.Random(1)
    torch.manual_seed(1)
    lowest, highest = torch.cuda.Stream.priority_range()
    for number in range(ROUNDS):
        calls = [layer(kernel, draw) for kernel in (*KERNELS, *KERNELS)]
        alone = [call() for call in calls]
        others = highest if number % 2 else lowest
        priorities = [lowest] * len(KERNELS) + [others] * len(KERNELS)
        streams = [torch.cuda.Stream(priority=priority) for priority in priorities]
        torch.cuda.synchronize()
        for _ in range(CALLS):
            results = []
            for call, stream in zip(calls, streams, strict=True):
                with torch.cuda.stream(stream):
                    results.append(call())
        torch.cuda.synchronize()
        pairs = [p for of in zip(results, alone, strict=True) for p in zip(*of, strict=True)]
        differ = sum(not torch.equal(*pair) for pair in pairs)
        print(f"round {number}: {differ} differ", flush=True)


if __name__ == "__main__":
    main()
