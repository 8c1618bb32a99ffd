"""Answer a question with PEFT, on the 16-bit base model, with an adapter that lowbit trained.

python examples/adapter_in_peft.py --adapter out/demo "What is NF4?"
"""

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("question")
parser.add_argument("--adapter", type=Path, default=Path("out/demo"))
options = parser.parse_args()

base = json.loads((options.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
# The demo's base model is a GGUF file; transformers wants its folder and its name.
file = Path(base) if base.endswith(".gguf") else None
place, arguments = (file.parent, {"gguf_file": file.name}) if file else (base, {})
tokenizer = AutoTokenizer.from_pretrained(place, **arguments)
model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **arguments)
model = PeftModel.from_pretrained(model, options.adapter)

# The demo was trained with an empty system prompt.
messages = [{"role": "system", "content": ""}, {"role": "user", "content": options.question}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, max_new_tokens=60, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
