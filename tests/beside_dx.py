"""Layers whose adapter's gradients run beside dx on a card of 132 SMs."""

# (M, N, K, r): the SMs they have there, and launches of dx. Sums over all tokens, and in parts.
LAYERS = {
    (256, 4096, 4096, 16): (4, 1),
    (512, 4096, 4096, 12): (4, 1),
    (1000, 8192, 4096, 16): (4, 1),
    (400, 3520, 8832, 16): (4, 2),
    (300, 4288, 10944, 16): (4, 2),
    (250, 1032, 14336, 16): (20, 1),
    (200, 1024, 2048, 5): (68, 1),
    # Two pairs of CTAs share a tile's N, with 128 and 256 tokens, and four.
    (100, 4104, 1088, 16): (92, 1),
    (256, 14336, 4096, 16): (4, 1),
    (90, 6136, 576, 8): (84, 1),
}
