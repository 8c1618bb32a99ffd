"""Command line of lowbit: `lowbit info | finetune | generate | merge | bench`.

Nothing heavy is imported here, so that `lowbit --help` answers at once; torch and transformers are
imported by the command that needs them.
"""

import os

# While threads wait for each other, libgomp spins for milliseconds: fine on an idle machine,
# ruinous on a busy one: a small 4-bit product on two cores with two other processes took 15 ms
# by default and 0.5 ms with this, and as long as before on idle cores (AMD Zen 3, 2026-11). It is
# read when torch is imported.
SPIN_COUNT = "10000"


def main() -> None:
    """Run the command line; the entry point of the `lowbit` script."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    from .app import run

    run()
