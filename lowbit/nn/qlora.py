"""QLoRALinear: a 4-bit linear layer with a trained low-rank adapter.

    y = x W^T + bias + s * drop(x) A^T B^T        A = lora_A [r, K]    B = lora_B [N, r]

with s = alpha / r, or alpha / sqrt r (rsLoRA).
"""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import codebooks
from ..functional import check_probability, lora_matmul
from ..quantization import quantize
from ..state import state_entries
from ..weight import QuantizedWeight
from .linear import Linear4bit, _dense_linear

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class MergeError(NamedTuple):
    """What requantizing a merged weight did to one layer.

    Attributes:
        weight_error: ||W4 - (W + D)|| / ||W + D||, D the adapter's update and W4 the requantized
            sum; Frobenius norms.
        update: ||D|| / ||W + D||. Once weight_error exceeds it, rounding noise is larger than what
            was learnt.
    """

    weight_error: float
    update: float


class QLoRALinear(Linear4bit):
    """Apply y = x W^T + bias + s * drop(x) A^T B^T with W frozen in 4 bits and A, B trained.

    Args:
        in_features, out_features, bias: as in nn.Linear.
        r: rank, at least 1.
        alpha: LoRA constant; s = alpha / r.
        dropout: probability in [0, 1) with which an element of x is dropped for the adapter, in
            training only.
        use_rslora: s = alpha / sqrt(r).
        lora_dtype: dtype of lora_A and lora_B; default `dtype`. torch.float32 keeps master weights:
            products are computed in the dtype of x, gradients arrive in fp32.
        quant_type, blocksize, double_quant, nested_blocksize, layout, device, dtype: as in
            Linear4bit.

    Attributes:
        lora_A, lora_B: parameters [r, K] (Kaiming-uniform, as PEFT) and [N, r] (zeros); they follow
            `.to(dtype)`.
        r, alpha, scaling, dropout, use_rslora: the options; `scaling` is the s of the formula, and
            follows alpha as alpha follows it.
        adapter_enabled: set False to compute the base layer alone; a merged layer does not look at
            it.
        merged: whether the adapter is folded into the weight at present.
        Everything of Linear4bit.

    Shape: x [..., K] -> y [..., N] in the dtype of x.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: r < 1, alpha is not finite, or dropout is outside [0, 1).

    Notes:
        Gradients reach x, lora_A, lora_B and bias. The dropout mask comes from a counter-based
        generator seeded by torch's, so gradient checkpointing recomputes the same mask.

    Source: LoRA (Hu et al. 2021), QLoRA (Dettmers et al. 2023), rsLoRA (Kalajdzievski 2023).

    Example:
        >>> layer = lowbit.nn.QLoRALinear.from_linear(torch.nn.Linear(256, 128), r=8, alpha=16)
        >>> layer(torch.randn(4, 256)).sum().backward()
        >>> layer.lora_B.grad.shape
        torch.Size([128, 8])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        use_rslora: bool = False,
        lora_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if not is_rank(r) or r < 1:
            raise ValueError(
                f"r must be an integer of at least 1, got {r!r}; without adapter, use Linear4bit"
            )
        _check_alpha(alpha)
        check_probability(dropout, "dropout")
        super().__init__(in_features, out_features, bias, **options)
        self.r, self.dropout, self.use_rslora = int(r), float(dropout), bool(use_rslora)
        self.alpha = alpha
        self.adapter_enabled = True
        self._unmerged: QuantizedWeight | None = None
        dtype = self.weight_dtype if lora_dtype is None else lora_dtype
        if dtype not in _FLOATS:
            raise TypeError(
                f"lora_dtype must be float32, float16, bfloat16 or float64, got {dtype!r}"
            )
        place = {"dtype": dtype, "device": self.weight.device}
        self.lora_A = nn.Parameter(torch.empty(self.r, self.in_features, **place))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, self.r, **place))
        self.reset_adapter()

    @classmethod
    def from_quantized(
        cls,
        qw: QuantizedWeight,
        bias: torch.Tensor | None = None,
        *,
        lora_A: torch.Tensor | None = None,
        lora_B: torch.Tensor | None = None,
        **adapter_options: Any,
    ) -> QLoRALinear:
        """Make a layer around a weight that is quantized already, sharing its storage.

        Args:
            qw: QuantizedWeight [N, K].
            bias: tensor [N] or None; moved to the device of `qw` and shared if it is there already.
            lora_A, lora_B: tensors [r, K] and [N, r] to use as the adapter, shared; r and
                lora_dtype then follow from them. Default a fresh adapter.
            adapter_options: r, alpha, dropout, use_rslora, lora_dtype.

        Returns:
            The layer, on the device of `qw`.

        Raises:
            TypeError: `qw` is no QuantizedWeight, or another argument no tensor.
            ValueError: `qw` is not two-dimensional, only one of lora_A and lora_B is given, or they
                do not fit it.
        """
        if (lora_A is None) != (lora_B is None):
            raise ValueError("lora_A and lora_B must both be given, or both be None")
        if lora_A is None:
            layer = super().from_quantized(qw, bias, **adapter_options)
            layer.reset_adapter()
            return layer
        for name, value in (("lora_A", lora_A), ("lora_B", lora_B)):
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        r = lora_A.shape[0] if lora_A.dim() else 0
        if lora_A.shape != (r, qw.K) or lora_B.shape != (qw.N, r):
            raise ValueError(
                f"lora_A must be [r, K] and lora_B [N, r] with [N, K] = {list(qw.shape)}, got "
                f"{list(lora_A.shape)} and {list(lora_B.shape)}"
            )
        adapter_options |= {"r": r, "lora_dtype": lora_A.dtype}
        layer = super().from_quantized(qw, bias, **adapter_options)
        layer.lora_A = nn.Parameter(lora_A.detach().to(qw.device))
        layer.lora_B = nn.Parameter(lora_B.detach().to(qw.device))
        return layer

    _alpha = 0.0  # of layers pickled when alpha was an attribute: theirs follows from scaling

    @property
    def alpha(self) -> float:
        """scaling * r, or scaling * sqrt r for rsLoRA; to set one of the two sets both."""
        alpha, divisor = self._alpha, self._alpha_divisor()
        return alpha if self.scaling == alpha / divisor else self.scaling * divisor

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        _check_alpha(alpha)
        alpha = alpha if isinstance(alpha, (int, float)) else float(alpha)  # JSON has no others
        self._alpha, self.scaling = alpha, alpha / self._alpha_divisor()

    def _alpha_divisor(self) -> float:
        return math.sqrt(self.r) if self.use_rslora else self.r

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.adapter_enabled or self._unmerged is not None:
            return super().forward(x)
        lora_A, lora_B, bias = self.trained()
        dropout_p = self.dropout if self.training else 0.0
        return lora_matmul(
            x, self.weight_args(), lora_A, lora_B, self.scaling, bias=bias, dropout_p=dropout_p
        )

    def trained(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(lora_A, lora_B, bias), read where nn.Module looks last."""
        parameters = self._parameters
        try:
            return parameters["lora_A"], parameters["lora_B"], parameters["bias"]
        except KeyError:  # FSDP1 replaces parameters by plain attributes
            return self.lora_A, self.lora_B, self.bias

    def reset_parameters(self) -> None:
        """Draw weight, bias and adapter anew; nothing happens on the meta device."""
        super().reset_parameters()
        if "lora_A" in self._parameters:  # not yet, while the base class is being built
            self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Draw lora_A Kaiming-uniform and set lora_B to zero, on the device of the weight.

        Meta parameters are replaced by real ones once the weight is real.
        """
        device = self.weight.device
        for name in ("lora_A", "lora_B"):
            param = getattr(self, name)
            if param.is_meta and not self.weight.is_meta:
                fresh = torch.empty_like(param, device=device)
                setattr(self, name, nn.Parameter(fresh, requires_grad=param.requires_grad))
        if self.lora_A.is_meta:
            return
        # Drawn in fp32 and rounded, as PEFT does: the same seed gives the same adapter in every
        # dtype.
        drawn = torch.empty(self.lora_A.shape, dtype=torch.float32, device=device)
        self.lora_A.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5)))
        self.lora_B.zero_()

    @torch.no_grad()
    def delta_weight(self) -> torch.Tensor:
        """The adapter's update of the weight: s B A, fp32 [N, K]."""
        return (self.lora_B.float() @ self.lora_A.float()) * self.scaling

    @torch.no_grad()
    def merge(self) -> MergeError:
        """Fold the adapter into the 4-bit weight: W <- quantize(W + s B A). `unmerge` restores the
        weight bit for bit.

        Requantizing rounds; the result says by how much. Use `to_linear` for a merge without that
        loss. While merged, the old weight is kept (memory of a second 4-bit weight), state_dict
        still describes base and adapter, and the adapter gets no gradient.

        Returns:
            MergeError with the relative error of the requantized weight and the relative size of
            the update.

        Raises:
            ValueError: the layer is merged already, its adapter is switched off, it has no data, or
                the merged weight has NaN or Inf.
        """
        if self.merged:
            raise ValueError("the adapter is merged already; call unmerge() first")
        if not self.adapter_enabled:
            raise ValueError("the adapter is switched off; set adapter_enabled = True first")
        if self.weight.is_meta or self.lora_A.is_meta:
            raise ValueError("the layer is on the meta device and has no data; load it first")
        base = self.quantized_weight
        delta = self.delta_weight()
        exact = base.dequantize(torch.float32) + delta
        packed = _requantize(exact, base)
        norm = max(exact.norm().item(), torch.finfo(torch.float32).tiny)
        error = (packed.dequantize(torch.float32) - exact).norm().item() / norm
        self._adopt(packed)
        self._unmerged = base
        return MergeError(error, delta.norm().item() / norm)

    def unmerge(self) -> None:
        """Restore the weight from before `merge`, bit for bit.

        Raises:
            ValueError: the layer is not merged.
        """
        if self._unmerged is None:
            raise ValueError("the adapter is not merged; call merge() first")
        self._adopt(self._unmerged)
        self._unmerged = None

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return a dense nn.Linear with the adapter folded in: RN_dtype(W + s B A), the sum in
        fp32.

        Args:
            dtype: fp32, fp16 or bf16; default `weight_dtype`.

        Returns:
            nn.Linear on the same device; up to the one rounding it computes what this layer
            computes in eval mode.
        """
        dtype = self.weight_dtype if dtype is None else dtype
        base = self._unmerged if self._unmerged is not None else self.quantized_weight
        return _dense_linear(self, base.dequantize(torch.float32).add_(self.delta_weight()), dtype)

    def without_adapter(self) -> Linear4bit:
        """Return a Linear4bit on the same storage; a merged layer keeps the merged weight."""
        layer = Linear4bit.from_quantized(self.quantized_weight)
        layer.register_parameter("bias", self.bias)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        state = "" if self.adapter_enabled else ", adapter_enabled=False"
        state += ", merged=True" if self.merged else ""
        return (
            f"{super().extra_repr()}, r={self.r}, alpha={self.alpha}, dropout={self.dropout}{state}"
        )

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if self._unmerged is not None:
            self._unmerged = self._unmerged.to(self.weight.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Base and adapter are saved: a merged weight beside the adapter would count it twice.
        if self._unmerged is not None:
            entries = state_entries(self._unmerged, prefix + "weight")
            if keep_vars:
                packed = entries[prefix + "weight"]
                entries[prefix + "weight"] = nn.Parameter(packed, requires_grad=False)
            destination.update(entries)

    def _inspect_state(self, state_dict, prefix: str, assign: bool):
        qw, problems = super()._inspect_state(state_dict, prefix, assign)
        if self.merged:
            problems.append(f"{prefix}weight has its adapter merged; call unmerge() before loading")
        return qw, problems


def is_rank(r) -> bool:
    """Whether r is an integer, of whatever type; True and False are none."""
    return isinstance(r, numbers.Integral) and not isinstance(r, bool)


def _check_alpha(alpha) -> None:
    if not isinstance(alpha, numbers.Real) or not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, got {alpha!r}")


def _requantize(exact: torch.Tensor, like: QuantizedWeight) -> QuantizedWeight:
    """Quantize a dense fp32 weight in the format of another one."""
    fp8 = like.double_quant and torch.equal(
        like.nested_codebook.cpu(), codebooks.nested_codebook("fp8")
    )
    custom = like.quant_type == "custom"
    packed = quantize(
        exact,
        quant_type="nf4" if custom else like.quant_type,
        blocksize=like.blocksize,
        double_quant=like.double_quant,
        nested_blocksize=like.nested_blocksize,
        double_quant_type="fp8" if fp8 else "dynamic",
        layout="rows" if like.row_blocks else "flat",
        codebook=like.codebook if custom else None,
    )
    packed.dtype = like.dtype
    return packed
