"""State-dict entries of a 4-bit weight, in the keys of bitsandbytes, and the checks that let them
back in.

A weight stored under the key `weight` is these tensors (what follows `weight` is appended to that
key):

    weight                                  uint8 [bytes, 1], packed codes, element 2i in the high
                                            nibble of byte i
    weight.absmax                           fp32 [blocks], or uint8 [blocks] when double-quantized
    weight.quant_map                        fp32 [16], the codebook
    weight.nested_absmax                    fp32 [ceil(blocks / nested_blocksize)], double-quantized
                                            only
    weight.nested_quant_map                 fp32 [256], double-quantized only
    weight.quant_state.bitsandbytes__nf4    uint8 [n], JSON: quant_type, blocksize, dtype, shape
                                            and, double-quantized, nested_blocksize, nested_dtype,
                                            nested_offset

A weight that bitsandbytes has no words for (row-aligned blocks when K is no multiple of the
blocksize, a codebook other than NF4 and FP4) stores its JSON under
`weight.quant_state.lowbit__<type>` with one more field, `layout`, so that bitsandbytes refuses it
instead of misreading it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from . import codebooks
from .quantization import BLOCKSIZES
from .weight import QuantizedWeight

_BLOB = "quant_state."
_BNB, _OWN = "bitsandbytes__", "lowbit__"
_BNB_TYPES = ("nf4", "fp4")
_OWN_TYPES = (*codebooks.NAMES, "custom")
_TENSOR_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Storage dtypes that bitsandbytes offers for the packed bytes (its `quant_storage`); only the bytes
# matter.
_STORAGES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)
# bitsandbytes' kernels ignore quant_map and use built-in tables; releases differ from each other by
# less than this.
_TABLE_TOLERANCE = 1e-4


class CheckpointError(ValueError, RuntimeError):
    """A checkpoint does not fit or is damaged; nothing was changed.

    It is a RuntimeError too because that is what torch raises for state dicts that do not fit.
    """


def packed_bytes(N: int, K: int, row_blocks: bool) -> int:
    """Bytes of the packed codes of a weight [N, K]."""
    return N * -(-K // 2) if row_blocks else -(-N * K // 2)


def block_count(N: int, K: int, blocksize: int, row_blocks: bool) -> int:
    """Entries of absmax of a weight [N, K]."""
    return N * -(-K // blocksize) if row_blocks else -(-N * K // blocksize)


def empty_weight(
    N: int,
    K: int,
    *,
    quant_type: str,
    blocksize: int,
    double_quant: bool,
    nested_blocksize: int,
    row_blocks: bool,
    dtype: torch.dtype,
    device: torch.device | str,
) -> QuantizedWeight:
    """Uninitialized tensors of the right shapes; what a module on the meta device holds."""
    blocks = block_count(N, K, blocksize, row_blocks)

    def fp32(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    return QuantizedWeight(
        torch.empty((packed_bytes(N, K, row_blocks), 1), dtype=torch.uint8, device=device),
        torch.empty(blocks, dtype=torch.uint8, device=device) if double_quant else fp32(blocks),
        fp32(16),
        shape=(N, K),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=dtype,
        nested_absmax=fp32(-(-blocks // nested_blocksize)) if double_quant else None,
        nested_codebook=fp32(256) if double_quant else None,
        nested_offset=fp32() if double_quant else None,
        nested_blocksize=nested_blocksize,
        row_blocks=row_blocks or K % blocksize == 0,
    )


def fits_bitsandbytes(qw: QuantizedWeight) -> bool:
    """Whether bitsandbytes' format can express the weight."""
    flat = not qw.row_blocks or qw.K % qw.blocksize == 0
    return flat and qw.quant_type in _BNB_TYPES


def state_entries(qw: QuantizedWeight, prefix: str = "weight") -> dict[str, torch.Tensor]:
    """Return the state-dict entries of a weight.

    Args:
        qw: QuantizedWeight on any device, the meta device included.
        prefix: key of the packed tensor; the others are `prefix.absmax` and so on.

    Returns:
        dict of tensors as the module docstring lists them. Codebooks are copied (64 bytes and 1
        KiB), because layers may share them and safetensors refuses shared storage; all others share
        the storage of `qw`.

    Example:
        >>> qw = lowbit.quantize(torch.randn(64, 128))
        >>> sorted(lowbit.state.state_entries(qw))[:3]
        ['weight', 'weight.absmax', 'weight.nested_absmax']
    """
    entries = {prefix: qw.qweight.reshape(-1, 1), f"{prefix}.absmax": qw.absmax}
    entries[f"{prefix}.quant_map"] = qw.codebook.clone()
    if qw.double_quant:
        entries[f"{prefix}.nested_absmax"] = qw.nested_absmax
        entries[f"{prefix}.nested_quant_map"] = qw.nested_codebook.clone()
    owner = _BNB if fits_bitsandbytes(qw) else _OWN
    entries[f"{prefix}.{_BLOB}{owner}{qw.quant_type}"] = _encode_blob(qw)
    return entries


def _encode_blob(qw: QuantizedWeight) -> torch.Tensor:
    """The JSON in the order and spelling of bitsandbytes, so that the bytes are equal."""
    fields: dict[str, Any] = {
        "quant_type": qw.quant_type,
        "blocksize": qw.blocksize,
        "dtype": str(qw.dtype).removeprefix("torch."),
        "shape": list(qw.shape),
    }
    if qw.double_quant:
        fields["nested_blocksize"] = qw.nested_blocksize
        fields["nested_dtype"] = "float32"
        # A meta tensor has no value; the entry then only shows that there is one.
        fields["nested_offset"] = 0.0 if qw.nested_offset.is_meta else qw.nested_offset.item()
    if not fits_bitsandbytes(qw):
        fields["layout"] = "rows" if qw.row_blocks else "flat"
    text = json.dumps(fields).encode("utf-8")
    return torch.tensor(list(text), dtype=torch.uint8, device=qw.qweight.device)


def entry_keys(keys, prefix: str = "weight") -> list[str]:
    """Those of `keys` that belong to the weight stored under `prefix`."""
    return [key for key in keys if key == prefix or key.startswith(prefix + ".")]


def check_entry(entry, key: str) -> None:
    """Raise CheckpointError for what is no tensor."""
    if not isinstance(entry, torch.Tensor):
        raise CheckpointError(f"{key} must be a tensor, got {type(entry).__name__}")


def is_complete(entries: Mapping[str, torch.Tensor], prefix: str = "weight") -> bool:
    """Whether entries that arrive one by one are all there."""
    parts = {key[len(prefix) + 1 :] for key in entry_keys(entries, prefix)}
    blob = next((part for part in parts if part.startswith(_BLOB)), None)
    if blob is None or not {"", "absmax", "quant_map"} <= parts:
        return False
    nested = entries[f"{prefix}.absmax"].dtype == torch.uint8
    return not nested or {"nested_absmax", "nested_quant_map"} <= parts


def from_state_entries(
    entries: Mapping[str, torch.Tensor], prefix: str = "weight"
) -> QuantizedWeight:
    """Build a QuantizedWeight from state-dict entries, after checking every one of them.

    Args:
        entries: mapping that holds `prefix`, `prefix.absmax`, ...; other keys are not looked at.
        prefix: key of the packed tensor.

    Returns:
        QuantizedWeight sharing the storage of the entries. Flat blocks are reported as flat unless
        K is a multiple of blocksize, when the layouts have the same bytes.

    Raises:
        CheckpointError: an entry is missing, unknown, of the wrong dtype or size, not finite, or
            not valid JSON. The message begins with the key of the tensor.

    Example:
        >>> qw = lowbit.quantize(torch.randn(64, 128))
        >>> lowbit.state.from_state_entries(lowbit.state.state_entries(qw)).shape
        (64, 128)
    """
    for key in entry_keys(entries, prefix):
        check_entry(entries[key], key)
    blob_key, fields = _read_blob(entries, prefix)
    nested = "nested_offset" in fields
    required = _TENSOR_PARTS if nested else _TENSOR_PARTS[:2]
    known = {prefix, blob_key, *(f"{prefix}.{part}" for part in required)}
    for key in sorted(known):
        if key not in entries:
            raise CheckpointError(
                f"{key} is missing, but {blob_key} is there; the checkpoint is incomplete"
            )
    for key in entry_keys(entries, prefix):
        if key not in known:
            kind = "double-quantized" if nested else "plain"
            raise CheckpointError(f"{key} does not belong to a {kind} 4-bit weight")
    shape, blocksize = fields["shape"], fields["blocksize"]
    nested_blocksize = fields.get("nested_blocksize", 256)
    N, K = math.prod(shape[:-1]), shape[-1]
    row_blocks = fields.get("layout", "flat") == "rows" or K % blocksize == 0
    blocks = block_count(N, K, blocksize, row_blocks)
    qweight = _packed(entries, prefix, packed_bytes(N, K, row_blocks), shape)
    absmax = _checked(entries, f"{prefix}.absmax", torch.uint8 if nested else torch.float32, blocks)
    codebook = _checked(entries, f"{prefix}.quant_map", torch.float32, 16)
    if _BNB in blob_key:
        _check_table(codebook, f"{prefix}.quant_map", fields["quant_type"])
    nested_absmax = nested_codebook = nested_offset = None
    if nested:
        nested_blocks = -(-blocks // nested_blocksize)
        nested_absmax = _checked(entries, f"{prefix}.nested_absmax", torch.float32, nested_blocks)
        nested_codebook = _checked(entries, f"{prefix}.nested_quant_map", torch.float32, 256)
        nested_offset = torch.tensor(
            fields["nested_offset"], dtype=torch.float32, device=qweight.device
        )
    return QuantizedWeight(
        qweight,
        absmax,
        codebook,
        shape=tuple(shape),
        blocksize=blocksize,
        quant_type=fields["quant_type"],
        dtype=_DTYPES[fields["dtype"]],
        nested_absmax=nested_absmax,
        nested_codebook=nested_codebook,
        nested_offset=nested_offset,
        nested_blocksize=nested_blocksize,
        row_blocks=row_blocks,
    )


def _read_blob(entries, prefix) -> tuple[str, dict[str, Any]]:
    """Find and check the JSON entry."""
    start = f"{prefix}.{_BLOB}"
    keys = [key for key in entries if key.startswith(start)]
    if len(keys) != 1:
        raise _no_single_blob(entries, prefix, keys)
    key = keys[0]
    owner, separator, quant_type = key[len(start) :].partition("__")
    types = {_BNB: _BNB_TYPES, _OWN: _OWN_TYPES}.get(owner + separator, ())
    if quant_type not in types:
        raise CheckpointError(
            f"{key} is of a kind lowbit does not know; it reads {_BNB}nf4, {_BNB}fp4, {_OWN}*"
        )
    blob = entries[key]
    if blob.is_meta or blob.dtype != torch.uint8 or blob.dim() != 1:
        raise CheckpointError(f"{key} must be uint8 [bytes] with data, got {_describe(blob)}")
    try:
        fields = json.loads(bytes(blob.tolist()).decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are both ValueErrors
        raise CheckpointError(
            f"{key} does not hold valid JSON ({error}); the checkpoint is damaged"
        ) from None
    _check_fields(key, fields, quant_type, own=owner + separator == _OWN)
    return key, fields


def _no_single_blob(entries, prefix, keys) -> CheckpointError:
    if keys:
        return CheckpointError(f"{prefix} must have one {_BLOB}* entry, got {sorted(keys)}")
    if prefix in entries and not entry_keys(entries, prefix + ".absmax"):
        return CheckpointError(
            f"{prefix} is not quantized: {_describe(entries[prefix])} without {prefix}.{_BLOB}*; "
            "quantize a 16-bit checkpoint with lowbit.prepare(model, weights=...)"
        )
    return CheckpointError(
        f"{prefix}.{_BLOB}{_BNB}nf4 (or another type) is missing; the checkpoint is incomplete"
    )


def _check_fields(key: str, fields: Any, quant_type: str, own: bool) -> None:
    """Check types and ranges of the JSON's fields."""
    if not isinstance(fields, dict):
        raise CheckpointError(f"{key} must hold a JSON object, got {type(fields).__name__}")

    def size(value) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    def blocksize(name: str) -> bool:
        return size(fields.get(name)) and fields[name] in BLOCKSIZES

    shape, dtype = fields.get("shape"), fields.get("dtype")
    checks = {
        "quant_type": fields.get("quant_type") == quant_type,
        "blocksize": blocksize("blocksize"),
        "dtype": isinstance(dtype, str) and dtype in _DTYPES,
        "shape": isinstance(shape, list) and bool(shape) and all(size(n) for n in shape),
    }
    if "nested_offset" in fields or "nested_blocksize" in fields:
        offset = fields.get("nested_offset")
        largest = torch.finfo(torch.float32).max
        checks["nested_offset"] = isinstance(offset, (int, float)) and abs(offset) <= largest
        checks["nested_blocksize"] = blocksize("nested_blocksize")
        checks["nested_dtype"] = fields.get("nested_dtype") == "float32"
    if own:
        checks["layout"] = fields.get("layout") in ("rows", "flat")
    for name, good in checks.items():
        if not good:
            raise CheckpointError(
                f"{key} holds {name} = {fields.get(name)!r}, which is not possible here"
            )


def _packed(entries, key: str, n_bytes: int, shape) -> torch.Tensor:
    """The packed bytes as uint8 [bytes, 1], whatever dtype they are stored as."""
    stored = entries[key]
    got = stored.numel() * stored.element_size()
    if stored.dtype not in _STORAGES or got != n_bytes:
        raise CheckpointError(
            f"{key} must hold {n_bytes} packed bytes of a weight {shape}, got {_describe(stored)}"
        )
    flat = stored.detach().contiguous().view(-1)
    return flat.view(torch.uint8).view(-1, 1)


def _checked(entries, key: str, dtype: torch.dtype, length: int) -> torch.Tensor:
    """An entry [length] of the given dtype with finite values."""
    tensor = entries[key].detach()
    if tensor.dtype != dtype or tensor.numel() != length:
        expected = f"{str(dtype).removeprefix('torch.')} [{length}]"
        raise CheckpointError(f"{key} must be {expected}, got {_describe(tensor)}")
    if dtype.is_floating_point and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{key} has NaN or Inf; the checkpoint is damaged")
    return tensor.reshape(-1)


def _check_table(codebook: torch.Tensor, key: str, quant_type: str) -> None:
    if codebook.is_meta:
        return
    expected = codebooks.codebook(quant_type)
    if not torch.allclose(codebook.cpu(), expected, rtol=0.0, atol=_TABLE_TOLERANCE):
        raise CheckpointError(
            f"{key} is not the {quant_type} table, by which bitsandbytes would read the codes: "
            f"got {codebook.tolist()}"
        )


def _describe(tensor: torch.Tensor) -> str:
    where = " on meta" if tensor.is_meta else ""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{where}"
