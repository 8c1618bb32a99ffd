"""A 4-bit linear layer with a LoRA adapter, as lowbit and the libraries beside it compute it.

    y = x W^T + scaling * (x A^T) B^T            x [M, K]   W [N, K]   A [r, K]   B [N, r]

Every implementation is a builder: it takes the rotated weights of a layer (`Weights`) and returns
`Prepared`, whose `call(x, i)` multiplies with copy i. All run on any device that their library runs
on, so that the formulas are tested without a GPU. The dense ones hold the dequantized weight: all
have the same W, except where a library cannot take lowbit's bytes and quantizes by itself.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import dispatch, reference
from ..functional import lora_matmul
from ..quantization import quantize
from ..weight import QuantizedWeight

SCALING = 2.0  # alpha = 2 r, as most recipes have it
BLOCKSIZE = 64
PANELS = "cuda:panels"  # the kernel that lowbit-panels forces


class Weights:
    """`copies` copies of one quantized weight and its adapter, so that none is in the cache when it
    is read.
    """

    def __init__(
        self, N: int, K: int, r: int, dtype: torch.dtype, device: str | torch.device, copies: int
    ) -> None:
        self.N, self.K, self.r, self.dtype, self.copies = N, K, r, dtype, copies
        options = {"dtype": dtype, "device": device}
        self.original = torch.randn(N, K, **options).mul_(0.02)
        A = torch.randn(r, K, **options).mul_(K**-0.5)
        B = torch.randn(N, r, **options).mul_(0.02)
        self.A = [A.clone() for _ in range(copies)]
        self.B = [B.clone() for _ in range(copies)]
        q = quantize(self.original, blocksize=BLOCKSIZE)
        self.quantized = [q, *(clone(q) for _ in range(copies - 1))]

    @functools.cached_property
    def dense(self) -> list[torch.Tensor]:
        """The dequantized weight in 16 bits."""
        w = self.quantized[0].dequantize(self.dtype)
        return [w, *(w.clone() for _ in range(self.copies - 1))]

    @functools.cached_property
    def bitsandbytes(self) -> list[tuple]:
        """(packed, QuantState): lowbit's own tensors where both libraries have the same layout."""
        if self.K % BLOCKSIZE == 0:
            return [q.to_bnb() for q in self.quantized]
        from bitsandbytes.functional import quantize_4bit

        options = {"blocksize": BLOCKSIZE, "compress_statistics": True, "quant_type": "nf4"}
        return [quantize_4bit(self.original, **options) for _ in range(self.copies)]


def clone(q: QuantizedWeight) -> QuantizedWeight:
    """The same weight in memory of its own."""
    state = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in q.__getstate__().items()
    }
    copy = object.__new__(QuantizedWeight)
    copy.__setstate__(state)
    return copy


def exact_rows(q: QuantizedWeight, rows: torch.Tensor) -> torch.Tensor:
    """Rows of the weight in float64, by lowbit/reference.py."""
    if not q.row_blocks:  # blocks cross rows: read all of it
        with dispatch.force("reference"):
            return q.dequantize(torch.float32)[rows].double()
    w = q.args()
    absmax = reference.decode_absmax(
        w.absmax, w.nested_absmax, w.nested_codebook, w.nested_offset, w.nested_blocksize
    )
    absmax = absmax.view(w.N, -1)[rows].reshape(-1)
    qweight = w.qweight.view(w.N, -1)[rows]
    plain = (qweight, absmax, w.codebook, None, None, None)
    sizes = (len(rows), w.K, w.blocksize, w.nested_blocksize, True)
    return reference.dequantize_4bit(*plain, *sizes, torch.float32).double()


@dataclass
class Prepared:
    """An implementation with its weights."""

    call: Callable[[torch.Tensor, int], torch.Tensor]  # (x [M, K], index of the copy) -> y [M, N]
    exact_rows: Callable[[torch.Tensor], torch.Tensor]  # rows of its weight in float64
    weight_bytes: int  # of one stored weight
    held_bytes: int = 0  # buffers it keeps between calls, counted as memory of a call


@dataclass(frozen=True)
class Implementation:
    """One contender: how it is called in rows and records, what it is, how it is made."""

    name: str
    title: str
    build: Callable[[Weights], Prepared]
    missing: Callable[[], str | None] = lambda: None  # why it cannot run here
    lora: bool = True


# ---- 16-bit weight -------------------------------------------------------------------------------


def peft_formula(y, x, A, B):
    """y + ((x A^T) B^T) * scaling, step by step as PEFT's LoRA layer does it."""
    return y + F.linear(F.linear(x, A), B) * SCALING


def add_low_rank(y, x, A, B):
    """The same in place: scaling and addition belong to the second product."""
    return y.addmm_(torch.mm(x, A.t()), B.t(), alpha=SCALING)


def _dense(combine: Callable | None) -> Callable[[Weights], Prepared]:
    def build(weights: Weights) -> Prepared:
        W, A, B = weights.dense, weights.A, weights.B

        def call(x, i):
            y = F.linear(x, W[i])
            return y if combine is None else combine(y, x, A[i], B[i])

        return Prepared(call, _rows_of(weights), W[0].nbytes)

    return build


def _rows_of(weights: Weights) -> Callable[[torch.Tensor], torch.Tensor]:
    return functools.partial(exact_rows, weights.quantized[0])


# ---- lowbit --------------------------------------------------------------------------------------


def _lowbit(weights: Weights) -> Prepared:
    q, A, B = weights.quantized, weights.A, weights.B

    def call(x, i):
        return lora_matmul(x, q[i], A[i], B[i], SCALING)

    return Prepared(call, _rows_of(weights), q[0].nbytes)


def lowbit_kernel(operation: str, q: QuantizedWeight, r: int, M: int) -> str:
    """What lowbit's dispatch table chooses: a backend, and its kernel where it has several."""
    layer = dispatch.Layer(q.N, q.K, q.blocksize, q.row_blocks, r)
    row = dispatch.choose(operation, q.device, q.dtype, M, layer)
    return f"{row.backend}:{row.kernel}" if row.kernel else row.backend


def _lowbit_panels(weights: Weights) -> Prepared:
    own = _lowbit(weights)

    def call(x, i):
        with dispatch.force(PANELS):
            return own.call(x, i)

    return Prepared(call, own.exact_rows, own.weight_bytes)


# ---- bitsandbytes --------------------------------------------------------------------------------


def _not_installed(package: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        return None if importlib.util.find_spec(package) else f"{package} is not installed"

    return missing


def _bnb_rows(weights: Weights) -> Callable[[torch.Tensor], torch.Tensor]:
    return functools.partial(exact_rows, QuantizedWeight.from_bnb(*weights.bitsandbytes[0]))


def _bitsandbytes(weights: Weights) -> Prepared:
    """matmul_4bit, then PEFT's formula: what a PEFT model on a bitsandbytes layer does."""
    from bitsandbytes import matmul_4bit

    stored, A, B = weights.bitsandbytes, weights.A, weights.B

    def call(x, i):
        packed, state = stored[i]
        return peft_formula(matmul_4bit(x, packed.t(), state), x, A[i], B[i])

    return Prepared(call, _bnb_rows(weights), weights.quantized[0].nbytes)


class _UnslothStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dequantize, A, B):
        ctx.save_for_backward(x, A, B)
        ctx.dequantize = dequantize
        return add_low_rank(torch.mm(x, dequantize().t()), x, A, B)

    @staticmethod
    def backward(ctx, dy):
        x, A, B = ctx.saved_tensors
        u = torch.mm(dy, B)
        dx = torch.mm(dy, ctx.dequantize()).addmm_(u, A, alpha=SCALING)
        d_A = torch.mm(u.t(), x).mul_(SCALING)
        d_B = torch.mm(dy.t(), torch.mm(x, A.t())).mul_(SCALING)
        return dx, None, d_A, d_B


def _unsloth_style(weights: Weights) -> Prepared:
    """bitsandbytes' kernels dequantize the whole weight into buffers that all layers share, cuBLAS
    multiplies, and the low-rank term is added in place; backward dequantizes again. After a
    description of what Unsloth does; none of its code.
    """
    from bitsandbytes import functional

    stored, A, B = weights.bitsandbytes, weights.A, weights.B
    device = weights.original.device
    W = torch.empty(weights.N, weights.K, dtype=weights.dtype, device=device)
    absmax = torch.empty(stored[0][1].absmax.shape, dtype=torch.float32, device=device)

    def dequantize(packed, state):
        if device.type == "cpu":  # no kernel there writes into a given tensor
            return W.copy_(functional.dequantize_4bit(packed, state))
        functional.dequantize_blockwise(state.absmax, state.state2, out=absmax).add_(state.offset)
        options = {"blocksize": state.blocksize, "quant_type": state.quant_type}
        return functional.dequantize_4bit(packed, absmax=absmax, out=W, **options)

    def call(x, i):
        return _UnslothStyle.apply(x, functools.partial(dequantize, *stored[i]), A[i], B[i])

    held = W.nbytes + absmax.nbytes
    return Prepared(call, _bnb_rows(weights), weights.quantized[0].nbytes, held)


# ---- torchao -------------------------------------------------------------------------------------

_TORCHAO_HOMES = (
    "torchao.quantization.quantize_.workflows.nf4.nf4_tensor",
    "torchao.dtypes.nf4tensor",  # until 0.16
)


def _torchao(weights: Weights) -> Prepared:
    """linear_nf4 on torchao's own double-quantized NF4 weight, then PEFT's formula."""
    module = _first_module(_TORCHAO_HOMES)
    A, B = weights.A, weights.B
    first = module.to_nf4(weights.original, BLOCKSIZE, 256)
    stored = [first, *(first.clone() for _ in range(weights.copies - 1))]

    def call(x, i):
        return peft_formula(module.linear_nf4(x, stored[i]), x, A[i], B[i])

    def rows(indices):
        return stored[0].get_original_weight()[indices].double()

    tensors = ("quantized_data", "quantized_scalers", "quantization_factor")
    stored_bytes = sum(getattr(stored[0], name).nbytes for name in tensors)
    return Prepared(call, rows, stored_bytes)


def _first_module(names: tuple[str, ...]):
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reason = error
    raise RuntimeError(f"this torchao has no NF4 tensor ({reason})")


# What cannot be captured in a graph comes last; see timing.time_replays.
IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        Implementation("dense", "F.linear on a 16-bit weight, no LoRA", _dense(None), lora=False),
        Implementation("dense+lora", "dense + LoRA (PEFT formula)", _dense(peft_formula)),
        Implementation("dense+addmm", "dense + LoRA (addmm)", _dense(add_low_rank)),
        Implementation("lowbit", "lowbit.lora_matmul, double-quantized NF4", _lowbit),
        Implementation(
            "lowbit-panels",
            "lowbit, dequantize + cuBLAS",
            _lowbit_panels,
            lambda: dispatch.obstacle("cuda", torch.device("cuda")),
        ),
        Implementation(
            "bitsandbytes",
            "matmul_4bit + LoRA (PEFT formula)",
            _bitsandbytes,
            _not_installed("bitsandbytes"),
        ),
        Implementation(
            "unsloth-style",
            "dequantize into a shared buffer (bitsandbytes), matmul, addmm",
            _unsloth_style,
            _not_installed("bitsandbytes"),
        ),
        Implementation(
            "torchao", "linear_nf4 + LoRA (PEFT formula)", _torchao, _not_installed("torchao")
        ),
    )
}
