"""Linear4bit: nn.Linear whose weight is stored in 4 bits.

    y = x W^T + bias        W[n, k] = codebook[q[n, k]] * absmax[block(n, k)], frozen

The packed codes are the parameter `weight` (uint8 [bytes, 1], as in bitsandbytes) and everything
else that is needed to read them is a buffer, so device moves, FSDP, deepcopy, pickle and state_dict
see ordinary tensors. State-dict keys are those of bitsandbytes; see lowbit/state.py.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import nn

from ..codebooks import NAMES
from ..functional import matmul
from ..quantization import check_blocksize, quantize
from ..state import empty_weight
from ..weight import QuantizedWeight, WeightArgs
from .saving import BUFFERS, StateDict

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Linear4bit(StateDict, nn.Linear):
    """Apply y = x W^T + bias with a frozen 4-bit weight.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias [N].
        quant_type: "nf4", "fp4", "nf3" or "nf2".
        blocksize: elements per scale: 32, 64, ... 4096.
        double_quant: store the scales in 8 bits.
        nested_blocksize: scales per nested scale.
        layout: "rows" (blocks restart with each row) or "flat" (bitsandbytes); the same bytes when
            K is a multiple of blocksize.
        device: as in nn.Linear; on "meta" the tensors have their shapes and no data.
        dtype: dtype of the bias, and the one the weight counts as; default torch's default dtype.

    Attributes:
        weight: uint8 parameter [bytes, 1], packed codes, never trained.
        weight_absmax, weight_codebook, weight_nested_absmax, weight_nested_codebook,
            weight_nested_offset: buffers as in QuantizedWeight; the nested ones are None without
            double quantization. They and `weight` keep their dtype in `.to(dtype)`, `.half()` and
            the like.
        bias: parameter [N] or None.
        weight_dtype: dtype of the weight that was quantized; default of `to_linear`.
        quant_type, blocksize, nested_blocksize, row_blocks: as in QuantizedWeight.

    Shape: x [..., K] fp32, fp16 or bf16 (fp64: by plain torch) -> y [..., N] in the dtype of x.

    Raises:
        TypeError, ValueError: an option is out of range.

    Notes:
        A fresh layer draws its weight as nn.Linear does and quantizes it; `from_linear` is the
        usual way in. Gradients reach x and bias. `load_state_dict` takes quant_type, blocksize,
        double quantization and layout from the checkpoint and changes nothing if an entry is
        damaged. What averages parameters must leave `weight` out: an exponential average
        (torch.optim.swa_utils) is rounded to whole bytes, which are other codes.

    Source: QLoRA (Dettmers et al. 2023), section 3.

    Example:
        >>> layer = lowbit.nn.Linear4bit.from_linear(torch.nn.Linear(256, 128))
        >>> layer(torch.randn(4, 256)).shape
        torch.Size([4, 128])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        nested_blocksize: int = 256,
        layout: str = "rows",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the 16-bit weight
        dtype = torch.get_default_dtype() if dtype is None else dtype
        in_features = _checked_size(in_features, "in_features")
        out_features = _checked_size(out_features, "out_features")
        _check_format(quant_type, blocksize, nested_blocksize, layout, dtype)
        self.in_features, self.out_features = in_features, out_features
        options = {"quant_type": quant_type, "blocksize": blocksize, "double_quant": double_quant}
        # Follows torch.device contexts and set_default_device.
        device = torch.empty(0, device=device).device
        self._adopt(
            empty_weight(
                out_features,
                in_features,
                **options,
                nested_blocksize=nested_blocksize,
                row_blocks=layout == "rows",
                dtype=dtype,
                device=device,
            )
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        nested_blocksize: int = 256,
        double_quant_type: str = "dynamic",
        layout: str = "rows",
        codebook: torch.Tensor | None = None,
        device: torch.device | str | None = None,
        **adapter_options: Any,
    ) -> Linear4bit:
        """Quantize a linear layer.

        Args:
            linear: nn.Linear with a floating weight; or a layer that is quantized already
                (Linear4bit, or bitsandbytes' Linear4bit), whose storage is shared and to which the
                quantization options do not apply.
            quant_type, blocksize, double_quant, nested_blocksize, double_quant_type, layout,
                codebook: as in `lowbit.quantize`.
            device: where to quantize and keep the layer; default where it is. A meta layer gives a
                meta layer.
            adapter_options: for QLoRALinear: r, alpha, dropout, use_rslora, lora_dtype.

        Returns:
            A new layer. The bias is shared when it stays on its device; `linear` itself is not
            changed.

        Raises:
            TypeError: `linear` is no nn.Linear or its dtype is not supported.
            ValueError: an option is out of range, or the weight has NaN or Inf.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        qw = _existing_weight(linear)
        if qw is None:
            options = {
                "quant_type": quant_type,
                "blocksize": blocksize,
                "double_quant": double_quant,
                "nested_blocksize": nested_blocksize,
                "layout": layout,
            }
            weight = linear.weight.detach()
            if weight.is_meta:
                if codebook is not None:
                    raise ValueError("codebook needs a weight with data, got one on meta")
                options |= {"device": "meta", "dtype": weight.dtype}
                shape = linear.in_features, linear.out_features, linear.bias is not None
                return cls(*shape, **options, **adapter_options).train(linear.training)
            weight = weight if device is None else weight.to(device)
            qw = quantize(weight, **options, double_quant_type=double_quant_type, codebook=codebook)
        elif device is not None:
            qw = qw.to(device)
        return cls.from_quantized(qw, linear.bias, **adapter_options).train(linear.training)

    @classmethod
    def from_quantized(
        cls, qw: QuantizedWeight, bias: torch.Tensor | None = None, **adapter_options: Any
    ) -> Linear4bit:
        """Make a layer around a weight that is quantized already, sharing its storage.

        Args:
            qw: QuantizedWeight [N, K].
            bias: tensor [N] or None; moved to the device of `qw` and shared if it is there already.
            adapter_options: for QLoRALinear: r, alpha, dropout, use_rslora, lora_dtype.

        Returns:
            The layer, on the device of `qw`.

        Raises:
            TypeError: `qw` is no QuantizedWeight, or `bias` no floating tensor.
            ValueError: `qw` is not two-dimensional, or `bias` does not fit it.
        """
        if not isinstance(qw, QuantizedWeight):
            raise TypeError(f"qw must be a QuantizedWeight, got {type(qw).__name__}")
        if len(qw.shape) != 2:
            raise ValueError(f"qw must have shape [N, K], got {list(qw.shape)}")
        N, K = qw.shape
        if bias is not None:
            _check_bias(bias, N)
        # The format is set by _adopt; quant_type "custom" would not be a valid argument.
        layer = cls(K, N, bias is not None, device="meta", dtype=qw.dtype, **adapter_options)
        layer._adopt(qw)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(qw.device), requires_grad=bias.requires_grad)
        return layer

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The weight as a QuantizedWeight on the same storage.

        It is built on every access (a few microseconds) and never kept, so it is right after
        `.to()`, `load_state_dict`, an FSDP swap of the parameter, deepcopy and pickle.
        """
        args = self.weight_args()
        return QuantizedWeight(
            args.qweight,
            args.absmax,
            args.codebook,
            shape=args.shape,
            blocksize=args.blocksize,
            quant_type=self.quant_type,
            dtype=self.weight_dtype,
            nested_absmax=args.nested_absmax,
            nested_codebook=args.nested_codebook,
            nested_offset=args.nested_offset,
            nested_blocksize=args.nested_blocksize,
            row_blocks=args.row_blocks,
        )

    def weight_args(self) -> WeightArgs:
        """`quantized_weight.args()`, without the object around it."""
        buffers = self._buffers
        weight = self._parameters.get("weight")
        return WeightArgs(
            # FSDP1 replaces the parameter by a plain attribute; reading that costs more.
            self.weight if weight is None else weight,
            buffers["weight_absmax"],
            buffers["weight_codebook"],
            buffers["weight_nested_absmax"],
            buffers["weight_nested_codebook"],
            buffers["weight_nested_offset"],
            self.out_features,
            self.in_features,
            self.blocksize,
            self.nested_blocksize,
            self.row_blocks,
        )

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return self._buffers["weight_nested_absmax"] is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return matmul(x, self.weight_args(), self.bias)

    def reset_parameters(self) -> None:
        """Draw weight and bias as nn.Linear does and quantize the weight; no-op on meta."""
        if self.weight.is_meta:
            return
        shape = self.out_features, self.in_features
        dense = torch.empty(shape, dtype=self.weight_dtype, device=self.weight.device)
        nn.init.kaiming_uniform_(dense, a=math.sqrt(5))
        self._adopt(
            quantize(
                dense,
                quant_type=self.quant_type,
                blocksize=self.blocksize,
                double_quant=self.double_quant,
                nested_blocksize=self.nested_blocksize,
                layout="rows" if self.row_blocks else "flat",
            )
        )
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return a dense nn.Linear with the dequantized weight.

        Args:
            dtype: fp32, fp16 or bf16; default `weight_dtype`.

        Returns:
            nn.Linear on the same device, its weight rounded once, its bias cast to dtype.
        """
        dtype = self.weight_dtype if dtype is None else dtype
        return _dense_linear(self, self.quantized_weight.dequantize(dtype), dtype)

    def extra_repr(self) -> str:
        layout = "" if self.row_blocks else ", layout=flat"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, quant_type={self.quant_type}, "
            f"blocksize={self.blocksize}, double_quant={self.double_quant}{layout}"
        )

    def _adopt(self, qw: QuantizedWeight) -> None:
        """Take over a weight: its tensors without a copy, and its format."""
        self.weight = nn.Parameter(qw.qweight.detach().reshape(-1, 1), requires_grad=False)
        for name, attribute in BUFFERS.items():
            self.register_buffer(name, getattr(qw, attribute), persistent=False)
        self._adopt_format(qw)

    def _adopt_format(self, qw: QuantizedWeight) -> None:
        self.quant_type, self.weight_dtype = qw.quant_type, qw.dtype
        self.blocksize, self.nested_blocksize, self.row_blocks = (
            qw.blocksize,
            qw.nested_blocksize,
            qw.row_blocks,
        )

    def _apply(self, fn, recurse: bool = True):
        """Move every tensor but keep the dtypes of the quantized weight: its scales are fp32."""
        frozen = {
            id(t)
            for t in (self.weight, *(self._buffers[name] for name in BUFFERS))
            if t is not None
        }

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            if id(tensor) in frozen and applied.dtype != tensor.dtype:
                return tensor.to(applied.device)
            return applied

        return super()._apply(keep_dtype, recurse)


def _checked_size(value, name: str) -> int:
    """An integer of any type, numpy's too, as one that files and operators take."""
    if not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return int(value)


def _check_bias(bias, N: int) -> None:
    if not isinstance(bias, torch.Tensor) or not bias.is_floating_point():
        got = bias.dtype if isinstance(bias, torch.Tensor) else type(bias).__name__
        raise TypeError(f"bias must be a floating tensor, got {got}")
    if bias.shape != (N,):
        raise ValueError(f"bias must be [N] = [{N}], got {list(bias.shape)}")


def _check_format(quant_type, blocksize, nested_blocksize, layout, dtype) -> None:
    """The checks of `lowbit.quantize`, which a layer on the meta device never calls."""
    if dtype not in _FLOATS:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
    if quant_type not in NAMES:
        raise ValueError(f"quant_type must be one of {', '.join(NAMES)}, got {quant_type!r}")
    check_blocksize(blocksize, "blocksize")
    check_blocksize(nested_blocksize, "nested_blocksize")
    if layout not in ("rows", "flat"):
        raise ValueError(f'layout must be "rows" or "flat", got {layout!r}')


def _existing_weight(linear: nn.Linear) -> QuantizedWeight | None:
    """The weight of a layer that is quantized already (ours or bitsandbytes'), else None."""
    if isinstance(linear, Linear4bit):
        return linear.quantized_weight
    if getattr(linear.weight, "quant_state", None) is not None:
        return QuantizedWeight.from_bnb(linear.weight)
    return None


def _dense_linear(layer: Linear4bit, weight: torch.Tensor, dtype: torch.dtype) -> nn.Linear:
    """nn.Linear around a dense weight, with a copy of the layer's bias and its training flag."""
    if dtype not in _FLOATS:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
    dense = nn.Linear(
        layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=dtype
    )
    dense.weight = nn.Parameter(weight.to(dtype))
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().to(dtype, copy=True))
    return dense.train(layer.training)
