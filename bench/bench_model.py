"""Training steps of whole models, in one record.

    python bench/bench_model.py --json bench/results/model_h100.json [--only llama-8b] [--peers]

The cases are those of `lowbit bench model`; see its --help. The record is written after each, so
that one that fails costs no other. The largest runs as if the card had MEMORY_LIMIT GiB: optimizer
state that does not fit there, less the pager's reserve of 2 GiB, is paged to the host. --peers adds
PEFT on bitsandbytes, with all of the card, to every case; one has it anyway where it is installed.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

from lowbit.benchmarks import model
from lowbit.benchmarks.model_build import why_no_peft
from lowbit.benchmarks.model_configs import CONFIGS
from lowbit.cli import source

MEMORY_LIMIT = 43.0
CASES = (
    {"config": "llama-8b", "rank": 16, "batch": 4, "seq": 1024, "graph": True},
    {"config": "llama-8b", "rank": 16, "batch": 1, "seq": 512, "graph": True},
    {"config": "llama-65b", "rank": 64, "batch": 1, "seq": 512, "graph": True,
     "memory_limit": MEMORY_LIMIT},
    {"config": "llama-8b", "rank": 16, "batch": 4, "seq": 1024, "checkpointing": False},
    {"config": "qwen2.5-vl-7b", "rank": 16, "batch": 1, "seq": 2048, "image": 1008,
     "compare": ["peft-bnb"]},
    {"config": "qwen2.5-vl-7b", "rank": 16, "batch": 4, "seq": 2048, "image": 1008},
    {"config": "qwen2.5-vl-72b", "rank": 16, "batch": 1, "seq": 2048, "image": 1008},
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help="one configuration")
    parser.add_argument("--peers", action="store_true", help="also PEFT on bitsandbytes")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timed steps, per row")
    parser.add_argument("--profile", action="store_true")
    o = parser.parse_args()
    no_peft = why_no_peft()
    if o.peers and no_peft is not None:
        parser.error(f"--peers: {no_peft}")
    source.quiet(offline=True)
    rows: list[model.Row] = []
    failed = 0
    for case in CASES:
        if o.only not in (None, case["config"]):
            continue
        peers = ["peft-bnb"] if o.peers else case.get("compare", [])
        options = {**case, "config": CONFIGS[case["config"]], "profile": o.profile}
        options["compare"] = peers if no_peft is None else []
        try:
            model.run(model.Options(**options, seconds=o.seconds), rows)
        except Exception as error:
            failed += 1
            print(f"# {case['config']} {case['batch']} x {case['seq']} failed: {error}", flush=True)
        gc.collect()  # what a failed case held, its traceback is gone now
        torch.cuda.empty_cache()
        if o.json is not None and rows:
            model.write_record(o.json, rows)
            print(f"written: {o.json}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
