"""The forward linear layer with a LoRA adapter on a GPU, against dense layers and other libraries.

    python bench/bench_nf4_lora_matmul.py --shapes llama-8b --m 1,16,256,4096
    python bench/bench_nf4_lora_matmul.py --shapes q8b,gate8b,down8b,gate70b \\
        --m 1,8,16,64,256,1024,4096,16384 --json bench/results/linear_h100.json --plot out/plots

The same as `lowbit bench linear`; what is measured and counted is in lowbit/benchmarks/linear.py.
"""

from __future__ import annotations

import sys

from lowbit.cli.app import app

if __name__ == "__main__":
    app(["bench", "linear", *sys.argv[1:]], prog_name="lowbit")
