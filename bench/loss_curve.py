"""Train the demo model twice, with lowbit and with PEFT on bitsandbytes, and compare the losses.

    python bench/loss_curve.py [--steps 200] [--batch 2] [--device cpu] [--dtype fp32]
                               [--json bench/results/loss_curve_cpu.json]

Both runs see the same batches, start from the same quantized weights and adapters (made by lowbit
and handed over), and take the same loss and optimizer (AdamW, fp32 adapters); what differs is who
multiplies and differentiates. A third run, lowbit again with the rows of every batch in reverse
order, shows what the order of additions alone does to a loss after so many steps.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from common import write_json
from torch import nn

import lowbit
from lowbit.cli import source
from lowbit.cli.data import read_examples
from lowbit.cli.encode import Batch, Renderer, collate, encode_all, epoch_order
from lowbit.cli.finetune import DEMO_SETTINGS
from lowbit.cli.loss import AnswerLoss

RANK, ALPHA, RATE, CLIP, SEED = 16, 32, 1e-3, 1.0, 0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_lowbit(model: nn.Module, device: str) -> nn.Module:
    torch.manual_seed(SEED)
    return lowbit.prepare(model, RANK, ALPHA, lora_dtype=torch.float32, device=device)


def with_peft(model: nn.Module, device: str) -> nn.Module:
    """bitsandbytes' 4-bit layers under PEFT's adapters, as prepare_model_for_kbit_training's
    users have them.
    """
    import bitsandbytes as bnb
    import peft

    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        packed, state = lowbit.quantize(linear.weight.detach().to(device)).to_bnb()
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype,
            quant_type="nf4", device="meta",
        )  # fmt: skip
        layer.weight = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, bnb_quantized=True, module=layer
        )
        layer.quant_state = state
        model.set_submodule(name, layer)
    model = model.to(device).requires_grad_(False)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def adapters(model: nn.Module) -> list[torch.Tensor]:
    """Trained parameters in the order of the modules."""
    return [p for p in model.parameters() if p.requires_grad]


def batches(tokenizer, steps: int, size: int) -> list[Batch]:
    """The demo's training data in the order of its epochs."""
    renderer = Renderer(tokenizer, system="")
    encoded, _ = encode_all(renderer, read_examples(DEMO_SETTINGS["data"]), 128)
    lengths, chosen, epoch = [len(item) for item in encoded], [], 0
    while len(chosen) < steps:
        order = epoch_order(lengths, size, SEED, epoch)
        chosen += [[encoded[i] for i in indices] for indices in order if len(indices) == size]
        epoch += 1
    return [collate(items, tokenizer.pad_token_id) for items in chosen[:steps]]


def reversed_rows(batch: Batch) -> Batch:
    return Batch(batch.ids.flip(0), batch.learn.flip(0), batch.tokens, batch.answers)


def train(name: str, model: nn.Module, data: list[Batch], device: str) -> dict:
    """Losses per answer token of every step, and seconds per step."""
    model.train()
    parameters = adapters(model)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    loss_of, losses, begin = AnswerLoss(plain), [], time.perf_counter()
    for step, batch in enumerate(data):
        loss = loss_of(batch, torch.device(device)) / batch.answers
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0 or step == len(data) - 1:
            print(f"{name:<28} step {step:>4}  loss {losses[-1]:.6f}", flush=True)
    return {"losses": losses, "seconds_per_step": (time.perf_counter() - begin) / len(data)}


def differences(a: list[float], b: list[float]) -> dict[str, float]:
    gaps = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return {"largest": max(gaps), "mean": sum(gaps) / len(gaps), "last": gaps[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    source.quiet(offline=True)
    place = source.resolve(source.demo_model())
    data = batches(source.load_tokenizer(place), o.steps, o.batch)

    def load() -> nn.Module:
        return source.load_model(place, DTYPES[o.dtype])

    ours, theirs = with_lowbit(load(), o.device), with_peft(load(), o.device)
    with torch.no_grad():
        for mine, other in zip(adapters(ours), adapters(theirs), strict=True):
            other.copy_(mine)
    runs = {"lowbit": train("lowbit", ours, data, o.device)}
    runs["peft-bnb"] = train("PEFT + bitsandbytes", theirs, data, o.device)
    del ours, theirs
    again = with_lowbit(load(), o.device)
    runs["lowbit, rows reversed"] = train(
        "lowbit, rows reversed", again, [reversed_rows(batch) for batch in data], o.device
    )
    curves = {name: run["losses"] for name, run in runs.items()}
    compared = {name: differences(curves["lowbit"], curve) for name, curve in curves.items()}
    del compared["lowbit"]
    for name, gap in compared.items():
        print(f"lowbit against {name}: " + ", ".join(f"{k} {v:.2g}" for k, v in gap.items()))
    if o.json:
        options = {"steps": o.steps, "batch": o.batch, "dtype": o.dtype, "rank": RANK, "lr": RATE}
        write_json(o.json, "loss_curve", [], options=options, runs=runs, differences=compared)


if __name__ == "__main__":
    main()
