"""Finding and replacing layers of a model: what prepare, checkpoint and adapters share."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .nn import Linear4bit, QLoRALinear

# What torch.compile and torch's checkpoint_wrapper call what is inside.
COMPILED, CHECKPOINTED = "_orig_mod", "_checkpoint_wrapped_module"


def check_module(model) -> None:
    """The first check of every function that takes a model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def plain(model: nn.Module) -> nn.Module:
    """The model inside of what torch.compile, checkpoint_wrapper, DistributedDataParallel or
    DataParallel made of it.
    """
    *_, model = _wrappers(model)
    return model


def _wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it came, what is inside, and so on to the model without wrappers."""
    check_module(model)
    while model is not None:
        yield model
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        else:
            # Not getattr: wrappers pass on what they have not to the model inside.
            model = model._modules.get(COMPILED, model._modules.get(CHECKPOINTED))


def own_name(name: str) -> str:
    """A name without the parts that compiled and checkpointed blocks add to it: files have those
    of the model without wrappers.
    """
    return ".".join(part for part in name.split(".") if part not in (COMPILED, CHECKPOINTED))


def own_names(model: nn.Module) -> dict[str, nn.Module]:
    """All modules under all their own names; what is inside of wrappers, not those."""
    return {own_name(name): m for name, m in model.named_modules(remove_duplicate=False)}


def check_replaceable(model: nn.Module) -> None:
    """Refuse a model of which DDP or FSDP2 keeps the parameters of all processes in step: it would
    go on with the old ones, and each process would train new ones for itself.

    Raises:
        ValueError: it is one.
    """
    if any(isinstance(m, DistributedDataParallel) for m in _wrappers(model)):
        raise ValueError(
            "model is wrapped in DistributedDataParallel, which would not see that layers are "
            "replaced; do this to the model itself and wrap it afterwards"
        )
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ValueError(
                f"{name} is sharded (FSDP2), and layers that replace others would not be; do this "
                "before fully_shard"
            )


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor, of which this process may hold a part only."""
    return hasattr(tensor, "full_tensor")


def check_whole(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse tensors of which this process may hold a part only.

    Raises:
        ValueError: names the first.
    """
    for name, tensor in tensors:
        if is_sharded(tensor):
            raise ValueError(
                f"{name} is sharded (FSDP2); gather the state dict on all ranks and load it into a "
                "whole model first, see docs/processes.md"
            )


def quantized_layers(model: nn.Module) -> dict[str, Linear4bit]:
    """All Linear4bit and QLoRALinear layers by name; a shared one under its first name."""
    check_module(model)
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}


def adapted_layers(model: nn.Module) -> dict[str, QLoRALinear]:
    """All QLoRALinear layers by name.

    Raises:
        ValueError: there is none.
    """
    check_module(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QLoRALinear)}
    if not layers:
        raise ValueError("model has no lowbit adapter; make one with lowbit.prepare(model, r=...)")
    return layers


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that can be replaced.

    Plain nn.Linear, lowbit's Linear4bit and quantized layers of bitsandbytes. Subclasses with a
    forward of their own are not: replacing them would change what they compute. Nor is the output
    projection of nn.MultiheadAttention, which reads the weight without calling the layer.
    """
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    if type(module).forward is nn.Linear.forward or isinstance(module, Linear4bit):
        return True
    return getattr(module.weight, "quant_state", None) is not None


def linear_names(model: nn.Module) -> list[str]:
    """Names of all replaceable linear layers; a layer used in several places has several names."""
    return [n for n, m in model.named_modules(remove_duplicate=False) if is_linear(m)]


def tied_names(model: nn.Module) -> set[str]:
    """Names of linear layers whose weight is also the parameter of another module."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(id(param), set()).add(id(module))
    return {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and len(owners.get(id(module.weight), ())) > 1
    }


def output_names(model: nn.Module) -> set[str]:
    """Names of the output embeddings: what the model reports, and any layer called lm_head."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        output = getter() if callable(getter) else None
    except NotImplementedError:
        output = None
    output = plain(output) if isinstance(output, nn.Module) else None
    return {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear)
        and (module is output or matches(own_name(name), "lm_head"))
    }


def fp32_names(model: nn.Module) -> set[str]:
    """Names of linear layers that a transformers model keeps in fp32 whatever the rest is in, such
    as T5's wo, whose module casts what it reads to the weight's dtype.
    """
    kinds = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    patterns = [pattern for kind in kinds for pattern in getattr(model, kind, None) or ()]
    return {
        name
        for name in linear_names(model)
        if any(f".{pattern}." in f".{own_name(name)}.weight." for pattern in patterns)
    }


def matches(name: str, pattern: str) -> bool:
    """PEFT's rule for one entry of a list: the whole name, or its last parts."""
    return name == pattern or name.endswith(f".{pattern}")


def select(names: Sequence[str], patterns: str | Iterable[str], argument: str, model) -> list[str]:
    """Return the names that a user's patterns mean; a layer's own name or the one with wrappers.

    Args:
        names: candidates.
        patterns: list of names or name endings; or a string, matched as a whole as a regular
            expression.
        argument: what to call it in messages.
        model: to explain what else a pattern may have meant.

    Raises:
        ValueError: a pattern matches nothing; the message lists close names.
    """
    if isinstance(patterns, str):
        try:
            expression = re.compile(patterns)
        except re.error as error:
            raise ValueError(f"{argument} is no valid regular expression: {error}") from None
        found = [
            name
            for name in names
            if any(expression.fullmatch(n) or matches(n, patterns) for n in (name, own_name(name)))
        ]
        if not found:
            raise _no_match(names, patterns, argument, model)
        return found
    if not isinstance(patterns, Iterable):
        raise TypeError(f"{argument} must be a list of names, got {patterns!r}")
    chosen: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must be a list of names, got {pattern!r} in it")
        found = [n for n in names if matches(n, pattern) or matches(own_name(n), pattern)]
        if not found:
            raise _no_match(names, pattern, argument, model)
        chosen.update(found)
    return [name for name in names if name in chosen]


def _no_match(names: Sequence[str], pattern: str, argument: str, model: nn.Module) -> ValueError:
    others = [
        f"{name} is of type {type(module).__name__}, which is not supported"
        for name, module in model.named_modules()
        if matches(name, pattern)
    ]
    names = [own_name(name) for name in names]
    endings = {name.rpartition(".")[2]: None for name in names}
    close = difflib.get_close_matches(pattern, [*endings, *names], n=4, cutoff=0.5)
    hint = others[0] if others else f"close names: {', '.join(close or list(endings)[:8])}"
    return ValueError(f"{argument}: no linear layer is called {pattern!r}; {hint}")


def replace(model: nn.Module, names: Sequence[str], build: Callable[[nn.Module], nn.Module]):
    """Replace one layer, found under all of `names`, by build(layer); return the model.

    The old layer is referenced by nothing of ours when this returns. A model that is itself the
    layer (name "") comes back as the new layer.
    """
    layer = model.get_submodule(names[0])
    new = build(layer)
    del layer
    for name in names:
        if name == "":
            return new
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, new)
        if child == COMPILED and hasattr(owner, "dynamo_ctx"):
            owner._initialize()  # its forward was bound to the old layer
        _leave_fast_path(model, parent)
    return model


def _leave_fast_path(model: nn.Module, name: str) -> None:
    """torch's encoders have a fast path that reads weights without calling the layers. It is left
    where the module `name` is part of one, by what it asks first.
    """
    parts = name.split(".") if name else []
    for count in range(len(parts) + 1):
        module = model.get_submodule(".".join(parts[:count]))
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0


def replace_all(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace layers by what `new` maps them to, under all their names; return the model."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            model = replace(model, [name], lambda _, by=new[module]: by)
    return model


def group_shared(model: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """Names grouped by the layer they mean, in order; most groups have one name."""
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(id(model.get_submodule(name)), []).append(name)
    return list(groups.values())


def train_adapters_only(model: nn.Module) -> None:
    """Freeze everything but lora_A and lora_B."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, QLoRALinear):
            module.lora_A.requires_grad_(True)
            module.lora_B.requires_grad_(True)


def forget_quantizer(model: nn.Module) -> None:
    """Take off what transformers notes on a model that it has loaded quantized, once no layer is
    bitsandbytes' any more. By those marks `.to(dtype)`, Trainer and save_pretrained refuse models
    whose weights are 4-bit, and files are read as if theirs were.
    """
    method = getattr(model, "quantization_method", None)
    if getattr(method, "value", method) not in ("bitsandbytes", "gguf"):
        return
    if any(type(m).__module__.partition(".")[0] == "bitsandbytes" for m in model.modules()):
        return
    marks = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "_weight_conversions")
    for owner, names in ((model, marks), (model.config, ("quantization_config", "_is_quantized"))):
        for name in names:
            if name in vars(owner):
                delattr(owner, name)
    model.is_quantized = False


def own(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that does not depend on a memory-mapped file or on the caller's tensor."""
    return tensor.detach().clone()
