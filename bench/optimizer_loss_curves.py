"""Fine-tune the demo model with every optimizer of `lowbit finetune` and compare the losses.

    python bench/optimizer_loss_curves.py [--device cpu] [--epochs 4] [--batch 8]
                                          [--json bench/results/optimizer_8bit_demo.json]

All runs are `lowbit finetune --demo`: SmolLM2-135M, rank 16, 121 questions, the same adapters and
the same batches. One more run has torch's AdamW and another seed, so other adapters and another
order of the data: what such a choice does to the losses is the scale for what 8-bit state does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import write_json

from lowbit.cli.settings import OPTIMIZERS

OTHER_SEED = "adamw, another seed"


def train(folder: Path, *options: str) -> dict:
    """Losses of every step, of the held-out data every epoch, and seconds per step of one run."""
    command = [sys.executable, "-m", "lowbit.cli", "finetune", "--demo", "--show", "0"]
    subprocess.run([*command, "--output", str(folder), *options], check=True)
    run = json.loads((folder / "run.json").read_text())
    seconds = sorted(step["seconds"] for step in run["steps"])
    return {
        "losses": [step["loss"] for step in run["steps"]],
        "held_out": [entry["loss"] for entry in run["held_out"]],
        "seconds_per_step": seconds[len(seconds) // 2],
    }


def differences(run: dict, expected: dict) -> dict[str, float]:
    """Of the training losses, and of the held-out losses after the start."""
    gaps = [abs(a - b) for a, b in zip(run["losses"], expected["losses"], strict=True)]
    pairs = zip(run["held_out"][1:], expected["held_out"][1:], strict=True)
    held_out = [abs(a - b) for a, b in pairs]
    return {
        "mean": sum(gaps) / len(gaps),
        "largest": max(gaps),
        "held_out_mean": sum(held_out) / len(held_out),
        "held_out_last": held_out[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--epochs", default="4")
    parser.add_argument("--batch", default="8")
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS), help="adamw among them")
    parser.add_argument("--json", help="write a record for bench/results/")
    options = parser.parse_args()
    shared = ("--device", options.device, "--epochs", options.epochs, "--batch", options.batch)
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.optimizers.split(","):
            runs[name] = train(Path(folder, name), "--optimizer", name, *shared)
        runs[OTHER_SEED] = train(Path(folder, "seed"), "--seed", "1", *shared)
    compared = {name: differences(run, runs["adamw"]) for name, run in runs.items()}
    print(f"{'':<20} {'last loss':>10} {'held out':>9} {'mean gap':>9} {'held-out gap':>13}")
    for name, run in runs.items():
        gaps = compared[name]
        print(
            f"{name:<20} {run['losses'][-1]:>10.4f} {run['held_out'][-1]:>9.4f} "
            f"{gaps['mean']:>9.4f} {gaps['held_out_mean']:>13.4f}"
        )
    if options.json:
        extra = {
            "epochs": options.epochs,
            "batch": options.batch,
            "runs": runs,
            "differences": compared,
        }
        write_json(options.json, "optimizer_curves", [], **extra)


if __name__ == "__main__":
    main()
