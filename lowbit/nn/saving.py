"""State dicts of the 4-bit layers: bitsandbytes' keys, and nothing changed unless all is well."""

from __future__ import annotations

import torch
from torch import nn

from ..state import CheckpointError, check_entry, entry_keys, from_state_entries, state_entries
from ..weight import QuantizedWeight

# Buffer of the module -> attribute of QuantizedWeight. Buffers are not persistent: they are saved
# under other names.
BUFFERS = {
    "weight_absmax": "absmax",
    "weight_codebook": "codebook",
    "weight_nested_absmax": "nested_absmax",
    "weight_nested_codebook": "nested_codebook",
    "weight_nested_offset": "nested_offset",
}


class _AnyName:
    """Has every public attribute, each of which is itself."""

    def __getattr__(self, name: str) -> _AnyName:
        if name.startswith("_"):
            raise AttributeError(name)
        return self


class StateDict(nn.Module):
    """The part of Linear4bit that saves and loads; see lowbit/state.py for the keys."""

    _entry_names = _AnyName()

    def _fqn_modifiers(self) -> dict[str, str]:
        """Let torch.distributed.checkpoint resolve keys such as "weight.absmax".

        It walks a key attribute by attribute and fails at `weight`, which is a plain tensor; this
        hook of torch sends the walk elsewhere.
        """
        return {"weight": "_entry_names"}

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, tensor in state_entries(self.quantized_weight, prefix + "weight").items():
            if key not in destination:
                destination[key] = tensor

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Check all entries of this layer first, then take them over."""
        assign = local_metadata.get("assign_to_params_buffers", False)
        qw, problems = self._inspect_state(state_dict, prefix, assign)
        if problems:
            error_msgs.extend(problems)
            return
        weight_key = prefix + "weight"
        ours = set(entry_keys(state_dict, weight_key))
        rest = {key: value for key, value in state_dict.items() if key not in ours}
        missing: list[str] = []
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys.extend(key for key in missing if qw is None or key != weight_key)
        if qw is not None:
            self._take(qw, assign)

    def _inspect_state(
        self, state_dict, prefix: str, assign: bool
    ) -> tuple[QuantizedWeight | None, list[str]]:
        """Read this layer's entries without changing it: (weight or None if absent, problems)."""
        problems = []
        weight_key = prefix + "weight"
        try:
            for name, param in self._parameters.items():
                entry = state_dict.get(prefix + name)
                if name == "weight" or param is None or entry is None:
                    continue
                check_entry(entry, prefix + name)
                if entry.shape != param.shape:
                    got, expected = list(entry.shape), list(param.shape)
                    problems.append(
                        f"size mismatch for {prefix}{name}: the checkpoint has {got}, "
                        f"the layer {expected}"
                    )
            if not entry_keys(state_dict, weight_key):
                return None, problems
            qw = from_state_entries(state_dict, weight_key)
        except CheckpointError as error:
            return None, [*problems, str(error)]
        if qw.shape != (self.out_features, self.in_features):
            got, expected = list(qw.shape), [self.out_features, self.in_features]
            problems.append(
                f"size mismatch for {weight_key}: the checkpoint has {got}, the layer {expected}"
            )
        if self.weight.is_meta and not assign:
            problems.append(
                f"{weight_key} is on the meta device in the model; load with assign=True"
            )
        return qw, problems

    @torch.no_grad()
    def _take(self, qw: QuantizedWeight, assign: bool) -> None:
        """Take a checked weight; without `assign`, copy it, in place where the sizes agree."""
        if assign:
            self._adopt(qw)
            return
        mine = self.quantized_weight
        pairs = [
            (getattr(mine, name), getattr(qw, name)) for name in ("qweight", *BUFFERS.values())
        ]
        if all(_same_layout(old, new) for old, new in pairs):
            for old, new in pairs:
                if old is not None:
                    old.copy_(new.view(old.shape))
            self._adopt_format(qw)
            return
        copied = qw.to(self.weight.device)
        for name in ("qweight", *BUFFERS.values()):
            tensor = getattr(copied, name)
            setattr(copied, name, None if tensor is None else tensor.clone())
        self._adopt(copied)


def _same_layout(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.numel() == b.numel() and a.dtype == b.dtype
