"""Layers whose adapter's gradients run beside dx, or in part within it, on a card of 132 SMs."""

# (M, N, K, r): the SMs they have beside it, launches of dx, and whether it makes the gradient of
# lora_A as well. Sums over all tokens, and in parts.
LAYERS = {
    (256, 4096, 4096, 16): (4, 1, 0),
    (512, 4096, 4096, 12): (4, 1, 1),
    (1000, 4096, 4096, 16): (4, 1, 1),
    (400, 6144, 8832, 16): (4, 2, 0),
    (300, 5120, 10944, 16): (4, 2, 0),
    (130, 512, 8192, 7): (4, 1, 1),
    (250, 1032, 14336, 16): (20, 1, 0),
    (200, 1024, 2048, 5): (68, 1, 1),
    # Two pairs of CTAs share a tile's N, with 128 and 256 tokens, and four.
    (100, 4104, 1088, 16): (92, 1, 0),
    (256, 14336, 4096, 16): (4, 1, 0),
    (90, 6136, 576, 8): (84, 1, 0),
    # Of more than 16 ranks: x read once for all of them and for each 16, in front and beside.
    (256, 4096, 4096, 64): (0, 1, 1),
    (130, 512, 8192, 17): (0, 1, 1),
    (512, 4096, 4096, 24): (0, 1, 1),
    (512, 4096, 2048, 40): (0, 1, 1),
    (90, 1032, 4160, 33): (64, 1, 1),
    (256, 4096, 4096, 32): (4, 1, 1),
    # All gradients of them in front, and beside.
    (512, 4096, 4096, 40): (0, 1, 0),
    (100, 4104, 1088, 50): (92, 1, 0),
    (600, 2048, 2048, 64): (36, 1, 0),
    # In front, on as few SMs as hide behind the product's first round.
    (256, 3584, 18944, 64): (0, 1, 0),
    # The second of two launches.
    (200, 9728, 8832, 16): (4, 2, 0),
}
