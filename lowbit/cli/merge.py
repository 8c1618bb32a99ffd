"""`lowbit merge`: base model plus adapter as one ordinary 16-bit Hugging Face folder."""

from pathlib import Path
from typing import Annotated, Any

from .errors import CliError, guard
from .generate import base_settings
from .options import Adapter, Model, Overwrite, Text, option

HELP = """Merge an adapter into its base model and write a 16-bit Hugging Face folder.

The update s B A is added to the ORIGINAL weights of the base model, W + s B A in float32, rounded
once: the result has no 4-bit error. With --onto-4bit it is added to the dequantized 4-bit weights
instead, which is exactly the model that was trained.
"""

EXAMPLES = """Examples:

\b
  lowbit merge --adapter out/demo --output out/merged
\b
  lowbit merge --adapter out/chats --model ./llama --dtype float16 \\
      --output out/merged
\b
  lowbit merge --adapter out/demo --onto-4bit --output out/merged
"""

MARKER = "lowbit_merge.json"

Output = Annotated[Text, option("--output", "-o", help="Folder to write.")]
Dtype = Annotated[str, option("--dtype", help="bfloat16, float16 or float32.")]
OntoFourBit = Annotated[
    bool, option("--onto-4bit", help="Add to the dequantized 4-bit weights, not the original ones.")
]


def merge(
    adapter: Adapter = None,
    output: Output = None,
    model: Model = None,
    dtype: Dtype = "bfloat16",
    onto_4bit: OntoFourBit = False,
    overwrite: Overwrite = False,
) -> None:
    with guard():
        if adapter is None:
            raise CliError("--adapter is missing")
        if not output:
            raise CliError("--output is missing")
        if dtype not in ("bfloat16", "float16", "float32"):
            raise CliError(f"--dtype must be bfloat16, float16 or float32, got {dtype}")
        run(adapter, Path(output), model, dtype, onto_4bit=onto_4bit, overwrite=overwrite)


def run(
    adapter: Path, output: Path, model_name: str | None, dtype_name: str, **options: bool
) -> None:
    """Load, merge, write to a temporary folder, rename."""
    from . import checkpoint, source

    settings = base_settings(adapter, {"model": model_name})
    checkpoint.check_output(output, overwrite=options["overwrite"])
    where = source.resolve(settings.model)
    source.quiet(offline=where.is_local)
    import torch

    from . import report

    dtype = getattr(torch, dtype_name)
    tokenizer = source.load_tokenizer(where)
    if options["onto_4bit"]:
        model, count = merged_onto_4bit(settings, where, adapter, dtype)
        base = "dequantized 4-bit weights"
    else:
        model, count = merged_onto_original(settings, where, adapter, dtype)
        base = "original weights"
    facts = {"base": settings.model, "adapter": str(adapter), "onto": base, "dtype": dtype_name}
    with checkpoint.folder_at_once(output) as temporary, source.no_progress_bars():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        checkpoint.write_json(temporary / MARKER, facts)
    console = report.make_console()
    report.note(console, "merged", f"{count} layers of {settings.model}, onto the {base}")
    report.note(console, "written", f"{output} ({dtype_name}, Hugging Face format)")


def merged_onto_original(settings: Any, where: Any, adapter: Path, dtype: Any) -> tuple[Any, int]:
    """RN_dtype(W + s B A) with W from the model's own files; returns the model and layer count.

    The model is quantized on the way, because that is what an adapter is loaded onto: its names,
    shapes and kind are checked there. The 16-bit weights are kept beside it.
    """
    import torch

    from . import adapt, source

    # A GGUF file is dequantized to float32; other models keep the dtype of their files.
    model = source.load_model(where, torch.float32 if where.gguf_file else "auto")
    originals = {
        name: layer.weight
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    if any(not weight.is_floating_point() for weight in originals.values()):
        raise CliError(
            f"model {where.name} is quantized and its original weights are not in it; use "
            "--onto-4bit, or name the 16-bit model with --model"
        )
    model, layers = _with_adapter(model, settings, adapter, adapt)
    for name, layer in layers.items():
        merged = originals.pop(name).detach().float()
        if hasattr(layer, "delta_weight"):
            merged = merged + layer.delta_weight()
        dense = layer.to_linear(dtype)
        dense.weight = torch.nn.Parameter(merged.to(dtype), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, dense)
    return model.to(dtype), _count_adapted(layers)


def merged_onto_4bit(settings: Any, where: Any, adapter: Path, dtype: Any) -> tuple[Any, int]:
    """RN_dtype(dequantize(W) + s B A): the model that training saw, as a dense one."""
    from .. import adapters
    from . import adapt, device, source

    # Quantization starts from the dtype of the run, which the run recorded; another one gives
    # slightly other scales.
    run_dtype = device.resolve_dtype(settings.dtype, device.resolve_device("auto"))
    model = source.load_model(where, run_dtype)
    model, layers = _with_adapter(model, settings, adapter, adapt)
    return adapters.merge(model, dtype=dtype).to(dtype), _count_adapted(layers)


def _with_adapter(model: Any, settings: Any, adapter: Path, adapt: Any) -> tuple[Any, Any]:
    """The model on the CPU, quantized and with its adapter, and its quantized layers by name."""
    import torch

    from ..nn import Linear4bit

    model = adapt.prepare_model(model, settings, torch.device("cpu"), rank=0)
    model = adapt.load_adapter(model, adapter, trainable=False)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    return model, layers


def _count_adapted(layers: dict[str, Any]) -> int:
    return sum(hasattr(layer, "delta_weight") for layer in layers.values())
