"""lowbit.matmul and lowbit.lora_matmul: the public, differentiable functions.

They check their arguments once, bring any batch shape to [M, K], resolve autocast and dropout's
seed, and go on in calls.py. Everything below trusts what they pass.
"""

from __future__ import annotations

import torch

from . import calls, repeated
from .weight import QuantizedWeight, WeightArgs

_FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))
_SEED_LIMIT = 2**63 - 1
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled


def matmul(x: torch.Tensor, w: QuantizedWeight | torch.Tensor, bias: torch.Tensor | None = None):
    """Multiply by a frozen weight: y = x W^T + bias.

    Args:
        x: [..., K] fp32, fp16 or bf16, any strides; under autocast it is cast to the autocast
            dtype. Also fp64, for comparisons: plain torch computes it, on any device.
        w: QuantizedWeight [N, K], or a dense tensor [N, K] in x's dtype.
        bias: [N] or None.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape; the message
            names it.

    Notes:
        Deterministic; the error against float64 is at most twice that of plain torch in x's dtype.
        Sums are fp32; for a single 16-bit row on an H100, runs of eight products are fp16.
        Gradients flow to x and bias; W gets none.

    Example:
        >>> q = lowbit.quantize(torch.randn(128, 256))
        >>> lowbit.matmul(torch.randn(3, 256), q).shape
        torch.Size([3, 128])
    """
    x = _autocast(x)
    weight = _weight_args(x, w)
    bias = _bias(x, weight, bias)
    y = calls.run("linear", _rows(x), *weight, bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.N)


def lora_matmul(
    x: torch.Tensor,
    w: QuantizedWeight | torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float | torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    adapter_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply by a frozen weight plus a low-rank update: y = x W^T + bias + (drop(x) A^T *
    scaling) B^T.

    Args:
        x: [..., K] fp32, fp16 or bf16, any strides; under autocast it is cast to the autocast
            dtype. Also fp64, for comparisons: plain torch computes it, on any device.
        w: QuantizedWeight [N, K], or a dense tensor [N, K] in x's dtype.
        lora_A: [r, K] in x's dtype or fp32; with adapter_index [adapters, r, K].
        lora_B: [N, r] in x's dtype or fp32; with adapter_index [adapters, N, r].
        scaling: alpha / r, or a vector [r] (AdaLoRA's singular values times the scale); with
            adapter_index also [adapters].
        bias: [N] or None.
        dropout_p: probability of dropping an element of x in the low-rank branch, 0 <= p < 1.
        adapter_index: integer [M] or x.shape[:-1]; row m uses adapter adapter_index[m], -1 the base
            weight only. Any other number is an error on a CPU. On a GPU, where the check would have
            to wait for the device, and in graphs that are traced, it counts as -1.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape; the message
            names it.

    Notes:
        Accurate as `matmul`, deterministic. Gradients flow to x, lora_A, lora_B, bias and a scaling
        tensor; W gets none. fp32 adapters with 16-bit x are rounded for the products and get fp32
        gradients. Dropout draws one seed from the device's torch generator and regenerates its
        Philox mask in backward; nothing of size [M, K] is stored.

    Source: LoRA (Hu et al. 2021) section 4.1; QLoRA (Dettmers et al. 2023) equation 5; AdaLoRA
        (Zhang et al. 2023) equation 3 for the vector.

    Example:
        >>> q = lowbit.quantize(torch.randn(128, 256))
        >>> A, B = torch.randn(8, 256), torch.zeros(128, 8)
        >>> lowbit.lora_matmul(torch.randn(3, 256), q, A, B, scaling=2.0).shape
        torch.Size([3, 128])
    """
    if dropout_p != 0.0:
        check_probability(dropout_p, "dropout_p")
    x = _autocast(x)
    repeatable = (
        type(scaling) is float
        and dropout_p == 0.0
        and adapter_index is None
        and repeated.possible(x)
        and calls.unwatched()
    )
    if repeatable:
        y = repeated.lora_matmul(x, w, lora_A, lora_B, scaling, bias)
        if y is not None:
            return y
    weight = _weight_args(x, w)
    bias = _bias(x, weight, bias)
    rows = _rows(x)
    if adapter_index is not None:
        leading, index = x.shape[:-1], adapter_index
        y = _mixed_adapters(rows, weight, lora_A, lora_B, scaling, bias, dropout_p, index, leading)
        return y.view(*leading, weight.N)
    A, B = _adapter(x, weight, lora_A, lora_B)
    vector, scalar = _scaling(x, scaling, A.shape[0])
    seed = _seed(x, dropout_p)
    y = calls.lora_linear(rows, weight, A, B, vector, scalar, bias, dropout_p, seed)
    if repeatable and x.is_contiguous() and A is lora_A and B is lora_B:
        records = calls.records((x, A, B, bias))
        repeated.remember(x.shape, x, weight, A, B, scaling, bias, records)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.N)


def check_probability(value, name: str) -> None:
    """Of dropping an element."""
    try:
        inside = 0.0 <= value < 1.0
    except TypeError:
        got = type(value).__name__
        raise TypeError(f"{name} must be a number in [0, 1), got {got} {value!r}") from None
    if not inside:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def _adapter_index(x: torch.Tensor, index: torch.Tensor, leading: torch.Size) -> torch.Tensor:
    """int64 [M] for the rows x [M, K] of a tensor of shape [*leading, K]."""
    integer = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
    if not integer or index.shape not in ((x.shape[0],), leading):
        raise ValueError(
            f"adapter_index must be an integer tensor with one entry per row, [{x.shape[0]}] or "
            f"{list(leading)}, got {index.dtype} {list(index.shape)}"
        )
    if index.device != x.device:
        raise ValueError(f"adapter_index must be on x's device {x.device}, got {index.device}")
    return index.reshape(-1).long()


def _mixed_adapters(x, weight, lora_A, lora_B, scaling, bias, dropout_p, index, leading):
    """Stack all adapters into one of rank adapters * r and mask z so that each row meets only its
    own.

    Costs adapters times the low-rank arithmetic, needs no sorting and no synchronization, and is
    differentiable.
    """
    for name, value in (("lora_A", lora_A), ("lora_B", lora_B), ("adapter_index", index)):
        _check_tensor(value, name)
    if lora_A.dim() != 3 or lora_B.dim() != 3 or lora_A.shape[0] != lora_B.shape[0]:
        raise ValueError(
            "with adapter_index, lora_A must be [adapters, r, K] and lora_B [adapters, N, r], got "
            f"{list(lora_A.shape)} and {list(lora_B.shape)}; stack the adapters"
        )
    index = _adapter_index(x, index, leading)
    adapters, r = lora_A.shape[:2]
    if index.device.type == "cpu" and calls.nothing_intercepts((index,)):
        least, greatest = (int(i) for i in index.aminmax())
        if least < -1 or greatest >= adapters:
            raise ValueError(
                f"adapter_index must lie in -1..{adapters - 1}, got {least}..{greatest}"
            )
    stacked_A, stacked_B = _adapter(
        x, weight, lora_A.flatten(0, 1), lora_B.permute(1, 0, 2).reshape(lora_B.shape[1], -1)
    )
    wide = torch.promote_types(x.dtype, torch.float32)
    try:
        scale = torch.as_tensor(scaling, dtype=wide, device=x.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"with adapter_index, scaling must be a number or [{adapters}], got {scaling!r}"
        ) from error
    if scale.dim() > 1 or (scale.dim() == 1 and scale.numel() != adapters):
        raise ValueError(
            f"with adapter_index, scaling must be a number or [{adapters}], got {list(scale.shape)}"
        )
    mine = index.unsqueeze(1) == torch.arange(adapters, device=x.device)  # [M, adapters]
    per_row = (mine * scale).repeat_interleave(r, dim=1)
    dropped = calls.run("dropout", x, dropout_p, _seed(x, dropout_p)) if dropout_p else x
    z = ((dropped @ stacked_A.to(x.dtype).t()) * per_row).to(x.dtype)
    return calls.run("linear", x, *weight, bias) + z @ stacked_B.to(x.dtype).t()


def _autocast(x: torch.Tensor) -> torch.Tensor:
    if not isinstance(x, torch.Tensor) or x.dtype not in _FLOATS:
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"x must be a float32, float16, bfloat16 or float64 tensor, got {got}")
    if _is_any_autocast_enabled() and _casts(x) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _casts(x: torch.Tensor) -> bool:
    """Whether autocast is on for x's device; asking about the meta device is an error in torch."""
    # The name of a device costs microseconds.
    if not _is_any_autocast_enabled() or x.is_meta:
        return False
    return torch.is_autocast_enabled(x.device.type)


def _rows(x: torch.Tensor) -> torch.Tensor:
    if x.dim() == 2 and x.is_contiguous():
        return x
    if x.layout is not torch.strided:
        raise TypeError(f"x must be a dense tensor, got {x.layout}")
    return x.reshape(-1, x.shape[-1]).contiguous()


def _weight_args(x: torch.Tensor, w, width: int | None = None) -> WeightArgs:
    """Of a weight that reads x, or another tensor like x of that width."""
    if type(w) is WeightArgs:  # a layer's own
        args = w
    elif isinstance(w, QuantizedWeight):
        if len(w.shape) != 2:
            raise ValueError(f"w must be a matrix [N, K], got a weight of shape {list(w.shape)}")
        args = w.args()
    elif isinstance(w, torch.Tensor):
        args = _dense_args(x, w)
    else:
        raise TypeError(f"w must be a QuantizedWeight or a tensor [N, K], got {type(w).__name__}")
    if args.qweight.device != x.device:
        raise ValueError(
            f"w must be on x's device {x.device}, got {args.qweight.device}; "
            "move one of them with .to()"
        )
    if x.dim() == 0 or (x.shape[-1] if width is None else width) != args.K:
        raise ValueError(f"x must be [..., K] with K = {args.K}, got {list(x.shape)}")
    return args


def _dense_args(x: torch.Tensor, w: torch.Tensor) -> WeightArgs:
    if w.dim() != 2 or not w.is_floating_point():
        raise ValueError(
            "w must be a floating tensor [N, K] or a QuantizedWeight, got "
            f"{w.dtype} {list(w.shape)}; "
            "packed bytes need lowbit.QuantizedWeight around them"
        )
    if w.numel() == 0:
        raise ValueError(f"w must not be empty, got {list(w.shape)}")
    if w.dtype != x.dtype:
        if not _casts(x):
            raise TypeError(f"w must have x's dtype {x.dtype}, got {w.dtype}; cast one of them")
        w = w.to(x.dtype)
    if not w.is_contiguous():
        raise ValueError(f"w must be contiguous, got strides {w.stride()}; call .contiguous()")
    return WeightArgs(w.detach(), None, None, None, None, None, w.shape[0], w.shape[1], 0, 0, True)


def _check_tensor(value, name: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _bias(x: torch.Tensor, weight: WeightArgs, bias: torch.Tensor | None) -> torch.Tensor | None:
    if bias is None:
        return None
    _check_tensor(bias, "bias")
    if bias.dtype not in _FLOATS or (bias.dtype == torch.float64 and x.dtype != torch.float64):
        raise TypeError(
            "bias must be a float32, float16 or bfloat16 tensor, or float64 like x, got "
            f"{bias.dtype}"
        )
    if bias.shape != (weight.N,):
        raise ValueError(f"bias must be [N] = [{weight.N}], got {list(bias.shape)}")
    if bias.device != x.device:
        raise ValueError(f"bias must be on x's device {x.device}, got {bias.device}")
    return bias if bias.is_contiguous() else bias.contiguous()


def _adapter(x, weight: WeightArgs, lora_A, lora_B) -> tuple[torch.Tensor, torch.Tensor]:
    _check_tensor(lora_A, "lora_A")
    _check_tensor(lora_B, "lora_B")
    shape = lora_A.shape
    if len(shape) != 2 or shape[1] != weight.K or shape[0] == 0:
        raise ValueError(f"lora_A must be [r, K] with K = {weight.K} and r >= 1, got {list(shape)}")
    if lora_B.shape != (weight.N, shape[0]):
        raise ValueError(
            f"lora_B must be [N, r] = [{weight.N}, {shape[0]}], got {list(lora_B.shape)}"
        )
    return _factor(x, lora_A, "lora_A"), _factor(x, lora_B, "lora_B")


def _factor(x: torch.Tensor, tensor: torch.Tensor, name: str) -> torch.Tensor:
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    dtype = tensor.dtype
    if dtype != x.dtype and dtype != torch.float32:
        if not _casts(x):
            others = "" if x.dtype == torch.float32 else ", or float32"
            raise TypeError(
                f"{name} must be {x.dtype} like x{others}, got {dtype}; cast one of them"
            )
        tensor = tensor.to(x.dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _scaling(x, scaling, r: int) -> tuple[torch.Tensor | None, float]:
    if not isinstance(scaling, torch.Tensor):
        try:
            if not isinstance(scaling, (str, bytes)):  # float() would read them
                return None, float(scaling)
        except (TypeError, ValueError):
            pass
        raise TypeError(f"scaling must be a number or a tensor [r] = [{r}], got {scaling!r}")
    if scaling.numel() == 1 and scaling.dim() == 0:
        scaling = scaling.expand(r)
    if scaling.shape != (r,):
        raise ValueError(
            f"scaling must be a number or a tensor [r] = [{r}], got {list(scaling.shape)}"
        )
    if scaling.is_complex():
        raise TypeError(f"scaling must be real, got {scaling.dtype}")
    if scaling.device != x.device:
        raise ValueError(f"scaling must be on x's device {x.device}, got {scaling.device}")
    wide = torch.promote_types(x.dtype, torch.float32)
    return scaling.to(wide).contiguous(), 1.0


def _seed(x: torch.Tensor, dropout_p: float) -> torch.Tensor | None:
    """One int64 from the device's generator: reproducible, replayed by checkpointing, capturable in
    a CUDA graph.
    """
    if dropout_p == 0.0:
        return None
    return torch.randint(-_SEED_LIMIT, _SEED_LIMIT, (1,), dtype=torch.int64, device=x.device)
