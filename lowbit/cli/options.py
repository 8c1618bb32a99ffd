"""Option types shared by the commands; each is the annotation of one parameter."""

from pathlib import Path
from typing import Annotated, Any

import typer


def option(*names: str, help: str, panel: str = "Run", **limits: Any) -> Any:
    """A typer option under a heading of the help text."""
    return typer.Option(*names, rich_help_panel=panel, help=help, **limits)


def paragraphs(text: str) -> str:
    """Help text with one line per paragraph: the terminal's width decides where lines break."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


Text = str | None
MAX_SEED = 2**63 - 1  # what torch's generators take

# ---- model and run -----------------------------------------------------------------------------

Model = Annotated[Text, option("--model", "-m", help="Hugging Face id, model folder or GGUF file.")]
Adapter = Annotated[
    Path | None, option("--adapter", "-a", help="Folder of a trained adapter, PEFT format.")
]
Device = Annotated[str, option("--device", help="auto, cpu or cuda.")]
Dtype = Annotated[str, option("--dtype", help="auto, float32, bfloat16 or float16.")]
Overwrite = Annotated[
    bool, option("--overwrite", help="Replace the output of an earlier lowbit run.")
]
System = Annotated[
    Text,
    option("--system", panel="Data", help="System prompt for chats without one; '' for none."),
]
_TEMPLATE = option(
    "--chat-template/--no-chat-template",
    panel="Data",
    help="Use the tokenizer's chat template where there is one.",
)
ChatTemplate = Annotated[bool, _TEMPLATE]

# ---- quantization ------------------------------------------------------------------------------

_QUANT_TYPE, _BLOCKSIZE, _DOUBLE_QUANT = (
    option(name, panel="Quantization", help=text)
    for name, text in (
        ("--quant-type", "nf4, fp4, nf3 or nf2."),
        ("--blocksize", "Weights that share a scale, 32 to 4096."),
        ("--double-quant/--no-double-quant", "Store the scales themselves in 8 bits."),
    )
)
QuantType = Annotated[str, _QUANT_TYPE]
Blocksize = Annotated[int, _BLOCKSIZE]
DoubleQuant = Annotated[bool, _DOUBLE_QUANT]

# ---- the same, where "not given" means: as in the run that wrote the adapter -------------------

ChatTemplateChoice = Annotated[bool | None, _TEMPLATE]
QuantTypeChoice = Annotated[Text, _QUANT_TYPE]
BlocksizeChoice = Annotated[int | None, _BLOCKSIZE]
DoubleQuantChoice = Annotated[bool | None, _DOUBLE_QUANT]
