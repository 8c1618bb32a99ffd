"""Filling a model from a stream of tensors, quantizing linear layers as their weights come."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from .modules import group_shared, own, replace
from .nn import Linear4bit, QLoRALinear
from .quantization import quantize
from .state import CheckpointError, from_state_entries, is_complete
from .tensor_files import TensorSource

_SHOWN = 5  # names listed in a message


class Materializer:
    """Replaces linear layers by empty quantized ones and fills model and layers from a
    TensorSource.

    Args:
        model: usually on the meta device; parameters that are real are overwritten when the source
            has them and kept when it has not.
        plan: {name of linear layer: gets an adapter}.
        quantization: options of `lowbit.quantize`.
        device: where everything goes, or None: where the source has it.
    """

    def __init__(self, model: nn.Module, plan: dict[str, bool], quantization, device) -> None:
        self.model, self.plan, self.quantization, self.device = model, plan, quantization, device
        self.layer_of: dict[str, str] = {}  # "q_proj.weight" -> first name of the layer
        for names in group_shared(model, plan):
            for name in names:
                self.layer_of[_child(name, "weight")] = names[0]
        self.slots = self._shared_slots()
        self.filled: set[str] = set()
        self.unexpected: list[str] = []
        self.pending: dict[str, dict[str, torch.Tensor]] = {}
        self.prefix = getattr(model, "base_model_prefix", "") + "."

    def _shared_slots(self) -> dict[str, list[str]]:
        """Every parameter and saved buffer -> all names of the same tensor (several if tied)."""
        groups: dict[int, list[str]] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            named = [*module._parameters.items()]
            named += [
                (name, buffer)
                for name, buffer in module._buffers.items()
                if name not in module._non_persistent_buffers_set
            ]
            for name, tensor in named:
                if tensor is not None:
                    groups.setdefault(id(tensor), []).append(_child(path, name))
        return {name: names for names in groups.values() for name in names}

    def run(self, source: TensorSource, adapter: dict[str, Any]) -> nn.Module:
        """Check names if they are known, swap the layers, and take the tensors one by one."""
        if source.names is not None:
            named = {self._resolve(name) for name in source.names} - {None}
            self._require(named)
        self._swap(adapter)
        for name, tensor in source:
            self._take(name, tensor)
            del tensor  # else it would live until the next one has been read
        self._finish()
        return self.model

    def _resolve(self, name: str) -> str | None:
        """The model's name for a tensor of the source; base-model prefixes may differ."""
        candidates = [name]
        if len(self.prefix) > 1:
            candidates += [self.prefix + name, name.removeprefix(self.prefix)]
        for candidate in candidates:
            if candidate in self.slots or self._weight_key(candidate) is not None:
                return candidate
        return None

    def _weight_key(self, name: str) -> str | None:
        """ "q_proj.weight" for it and for "q_proj.weight.absmax", if q_proj is to be quantized."""
        head, found, _ = name.rpartition(".weight.")
        key = f"{head}.weight" if found else name
        if not found and name.startswith("weight."):
            key = "weight"
        return key if key in self.layer_of else None

    def _require(self, named: set[str]) -> None:
        """Raise if something that has no data yet is not in the source."""
        keys = {self._weight_key(name) for name in named}
        covered = {self.layer_of[key] for key in keys if key is not None}
        missing = [key for key, layer in self.layer_of.items() if layer not in covered]
        for name, shared in self.slots.items():
            if name in self.layer_of or not _tensor_at(self.model, name).is_meta:
                continue
            if not any(other in named for other in shared):
                missing.append(name)
        if missing:
            raise CheckpointError(f"weights lack {_some(missing)}; nothing was changed")

    def _swap(self, adapter: dict[str, Any]) -> None:
        """Put empty quantized layers in place of the linear ones, which frees those."""
        for names in group_shared(self.model, self.plan):
            with_adapter = any(self.plan[name] for name in names)

            def build(linear: nn.Linear, with_adapter=with_adapter) -> Linear4bit:
                cls, options = (QLoRALinear, adapter) if with_adapter else (Linear4bit, {})
                shell = nn.Linear(
                    linear.in_features,
                    linear.out_features,
                    bias=False,
                    device="meta",
                    dtype=getattr(linear, "weight_dtype", linear.weight.dtype),
                )
                layer = cls.from_linear(shell, **self.quantization, **options)
                layer.register_parameter("bias", linear.bias)
                return layer.train(linear.training)

            self.model = replace(self.model, names, build)

    def _take(self, name: str, tensor: torch.Tensor) -> None:
        target = self._resolve(name)
        if target is None:
            self.unexpected.append(name)
            return
        key = self._weight_key(target)
        if key is None:
            self._fill(target, tensor)
            return
        layer_name = self.layer_of[key]
        layer = self.model.get_submodule(layer_name)
        if target == key and tensor.dtype.is_floating_point and tensor.shape == _dense(layer):
            self._quantize(layer, target, tensor)
        else:  # quantized before: collect its entries until all are there
            entries = self.pending.setdefault(layer_name, {})
            entries["weight" + target[len(key) :]] = tensor
            if not is_complete(entries):
                return
            self._adopt(layer, layer_name, self.pending.pop(layer_name))
        self.filled.add(layer_name)

    def _quantize(self, layer: Linear4bit, name: str, tensor: torch.Tensor) -> None:
        dense = tensor.detach().to(self.device or tensor.device, layer.weight_dtype)
        try:
            layer._adopt(quantize(dense, **self.quantization))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error

    def _adopt(self, layer: Linear4bit, name: str, entries: dict[str, torch.Tensor]) -> None:
        key = _child(name, "weight")
        entries = {key + part[len("weight") :]: tensor for part, tensor in entries.items()}
        qw = from_state_entries({k: own(t) for k, t in entries.items()}, key)
        if qw.shape != _dense(layer):
            raise CheckpointError(f"{key} has shape {list(qw.shape)}, needs {list(_dense(layer))}")
        layer._adopt(qw if self.device is None else qw.to(self.device))

    def _fill(self, name: str, tensor: torch.Tensor) -> None:
        """Set a parameter or buffer under all its names."""
        old = _tensor_at(self.model, name)
        if old.shape != tensor.shape:
            got, expected = list(tensor.shape), list(old.shape)
            raise CheckpointError(f"{name} has shape {got} in the weights, {expected} in the model")
        device = self.device or (tensor.device if old.is_meta else old.device)
        dtype = old.dtype if old.is_floating_point() else tensor.dtype
        new = tensor.detach().to(device, dtype)
        new = own(new) if new.data_ptr() == tensor.data_ptr() else new
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=False)
        for shared in self.slots[name]:
            path, _, child = shared.rpartition(".")
            module = self.model.get_submodule(path)
            target = module._parameters if child in module._parameters else module._buffers
            target[child] = new
            self.filled.add(shared)

    def _finish(self) -> None:
        """Draw adapters, check that nothing is left without data, report what was not used."""
        empty = [key for key, layer in self.layer_of.items() if layer not in self.filled]
        empty += [n for n in self.slots if n not in self.layer_of and n not in self.filled]
        empty = [n for n in empty if n in self.layer_of or _tensor_at(self.model, n).is_meta]
        if empty:
            reason = self._unused(empty) or f"weights lack {_some(empty)}"
            raise CheckpointError(f"{reason}; the model is incomplete, build it again")
        for layer in self.model.modules():
            if isinstance(layer, QLoRALinear):
                layer.reset_adapter()
        restore_buffers(self.model, self.device)
        if self.device is not None:
            self.model.to(self.device)
        if self.unexpected:
            warnings.warn(
                f"weights hold tensors that the model has not: {_some(self.unexpected)}",
                stacklevel=4,
            )

    def _unused(self, empty: list[str]) -> str | None:
        """What came for the first of these layers and was neither a dense nor a packed weight."""
        for key in empty:
            name = self.layer_of.get(key)
            entries = self.pending.get(name, {})
            if not entries:
                continue
            if set(entries) == {"weight"}:
                tensor = entries["weight"]
                got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                needed = list(_dense(self.model.get_submodule(name)))
                return f"{key} must be a floating tensor {needed}, got {got} in the weights"
            there = ", ".join(sorted(key + part[len("weight") :] for part in entries))
            return f"weights have of {key} only {there}"
        return None


def restore_buffers(model: nn.Module, device: torch.device | str | None) -> None:
    """Recompute buffers that are not saved (rotary frequencies) and have no data yet.

    transformers' models know how, in `_init_weights`. Whether a buffer was really written is seen
    by filling it with NaN (or the least integer) before.

    Raises:
        ValueError: nobody wrote a buffer.
    """
    if device is None:
        device = next((p.device for p in model.parameters() if not p.is_meta), "cpu")
    unknown = []
    for path, module in model.named_modules():
        names = [n for n, b in module._buffers.items() if b is not None and b.is_meta]
        if not names:
            continue
        for name in names:
            module._buffers[name] = _marked(module._buffers[name], device)
        if hasattr(model, "_init_weights"):
            _initialize_buffers(model, module, names)
        unknown += [_child(path, n) for n in names if _is_marked(module._buffers[n])]
    if unknown:
        raise ValueError(
            f"buffers {_some(unknown)} are on the meta device and in no checkpoint; build the "
            "model with real buffers, for instance under accelerate.init_empty_weights()"
        )


@torch.no_grad()
def _initialize_buffers(model: nn.Module, module: nn.Module, names: list[str]) -> None:
    """Let a transformers model initialize a module, and undo what that does to its parameters."""
    kept = [(t, own(t)) for t in module.parameters() if not t.is_meta]
    kept += [(b, own(b)) for name, b in module.named_buffers() if name not in names]
    model._init_weights(module)
    for tensor, value in kept:
        tensor.copy_(value)


def _marked(buffer: torch.Tensor, device) -> torch.Tensor:
    if buffer.dtype == torch.bool:
        return torch.empty_like(buffer, device=device)  # two values leave none to mark with
    mark = float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min
    return torch.full_like(buffer, mark, device=device)


def _is_marked(buffer: torch.Tensor) -> bool:
    if buffer.dtype == torch.bool:
        return True
    if buffer.is_floating_point():
        return bool(buffer.isnan().any())
    return bool((buffer == torch.iinfo(buffer.dtype).min).any())


def _tensor_at(model: nn.Module, name: str) -> torch.Tensor:
    path, _, child = name.rpartition(".")
    module = model.get_submodule(path)
    parameter = module._parameters.get(child)
    return module._buffers[child] if parameter is None else parameter


def _dense(layer: Linear4bit) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _child(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
