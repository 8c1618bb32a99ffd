"""A layer, a group or a gated MLP drawn at random: operands amid NaN, and what the formulas say."""

import random

import torch
from torch.nn import functional as F

import lowbit
from lowbit import functional, reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MEMBERS = {"layer": 1, "group": 3, "mlp": 3}


def _amid_nan(draw, t):
    """The same values amid NaN, seldom at an address that vector loads cannot read."""
    at = 8 * draw.randint(0, 16) if draw.random() < 0.9 else draw.randint(1, 15)
    memory = torch.full((t.numel() + 256 + at,), float("nan"), dtype=t.dtype, device=t.device)
    return memory[128 + at : 128 + at + t.numel()].view(t.shape).copy_(t)


def strided(draw, t):
    """The same matrix with other strides."""
    how = draw.choice(("amid", "amid", "amid", "columns", "sliced", "rows"))
    if how == "amid":
        return _amid_nan(draw, t)
    if how == "columns":
        return t.t().contiguous().t()
    rows, columns = t.shape
    if how == "sliced":
        columns += draw.choice((1, 8, 64))
    else:
        rows *= 2
    wide = torch.full((rows, columns), float("nan"), dtype=t.dtype, device=t.device)
    part = wide[:, : t.shape[1]] if how == "sliced" else wide[::2]
    return part.copy_(t)


class RandomCase:
    """Operands of a call. `leaves` may get gradients; `members` hold the rest of each layer."""

    def __init__(self, kind, seed, device, dropout=True):
        self.draw = draw = random.Random(f"{kind} {seed}")
        torch.manual_seed(seed)
        self.kind, self.device, self.leaves, self.members = kind, device, {}, []
        self.dtype = draw.choice((BF16, BF16, FP16, FP16, FP32))
        self.activation = draw.choice(("silu", "gelu", "gelu_tanh"))
        self.shared = kind != "layer" and draw.random() < 0.4
        self.p = draw.choice((0.05, 0.5)) if dropout and draw.random() < 0.2 else 0.0
        self.K = self._width(64)
        shapes = [(self._width(16), self.K) for _ in range(MEMBERS[kind])]
        if kind == "mlp":
            hidden = shapes[0][0]
            shapes = [(hidden, self.K), (hidden, self.K), (shapes[2][0], hidden)]
        masters, same_rank = draw.random() < 0.4, draw.random() < 0.5
        rank = draw.choice((8, 16, 64))
        for i, (N, K) in enumerate(shapes):
            r = rank if same_rank else draw.choice((1, 4, 5, 8, 16, 17, 32, 33, 64, 72))
            self._add_member(i, N, K, r, FP32 if masters else self.dtype)
        self.new_x()

    def _width(self, unit):
        most = 2560 if self.device.type == "cuda" else 320
        if self.draw.random() < 0.8:
            return unit * self.draw.randint(1, most // unit)
        return self.draw.randint(1, most // 4)

    def _add_member(self, i, N, K, r, adapter_dtype):
        draw = self.draw
        adapted = draw.random() < 0.9
        if adapted:
            self._leaf(f"{i}.A", _amid_nan(draw, self._randn(r, K) / K**0.5), adapter_dtype)
            self._leaf(f"{i}.B", _amid_nan(draw, self._randn(N, r) / r**0.5), adapter_dtype)
            if draw.random() < 0.2:
                self._leaf(f"{i}.s", torch.rand(r, device=self.device) + 0.5, FP32)
        if draw.random() < 0.4:
            self._leaf(f"{i}.bias", _amid_nan(draw, self._randn(N)), self.dtype)
        scaling, p = draw.choice((1.0, 2.0, 0.3, -1.5)), self.p
        if not self.shared and draw.random() < 0.2:
            p = 0.0
        self.members.append({"w": self._weight(N, K), "scaling": scaling, "p": p, "N": N})

    def _randn(self, *shape):
        return torch.randn(shape, device=self.device)

    def _weight(self, N, K):
        draw, weight = self.draw, self._randn(N, K) / K**0.5
        if draw.random() < 0.06:
            return weight.to(self.dtype)
        q = lowbit.quantize(
            weight,
            blocksize=draw.choice((64, 64, 64, 64, 32, 128, 1024)),
            quant_type=draw.choice(("nf4", "nf4", "fp4", "nf3")),
            double_quant=draw.random() < 0.6,
            layout=draw.choice(("rows", "rows", "flat")),
            nested_blocksize=draw.choice((256, 256, 32)),
        )
        if draw.random() < 0.3:
            q.qweight = self._bytes_elsewhere(q.qweight)
        return q

    def _bytes_elsewhere(self, t):
        at = 128 + self.draw.choice((0, 16, 48, 1))
        memory = torch.full((t.numel() + 256 + at,), 0xFF, dtype=t.dtype, device=t.device)
        return memory[at : at + t.numel()].view(t.shape).copy_(t)

    def _leaf(self, name, values, dtype):
        if values.dtype != dtype:
            values = _amid_nan(self.draw, values.to(dtype))
        self.leaves[name] = values.detach().requires_grad_(self.draw.random() < 0.85)

    def new_x(self):
        draw = self.draw
        many = (1024, 3000) if self.device.type == "cuda" else (70, 140)
        M = draw.choice((1, draw.randint(2, 64), draw.randint(65, many[0]), draw.randint(*many)))
        x = strided(draw, self._randn(M, self.K).to(self.dtype))
        if M % 2 == 0 and draw.random() < 0.3:
            x = x.unflatten(0, (2, M // 2))
        self.leaves["x"] = x.detach().requires_grad_(draw.random() < 0.8)

    def change(self):
        """Something that a call which remembers an earlier one could miss."""
        draw, names = self.draw, [name for name in self.leaves if name != "x"]
        member = draw.choice(self.members)
        what = draw.choice(("x", "new x", "weight", "values", "place", "trains", "scaling"))
        with torch.no_grad():
            if what == "x":
                self.leaves["x"].copy_(self._randn(*self.leaves["x"].shape))
            elif what == "new x":
                self.new_x()
            elif what == "weight" and not isinstance(member["w"], torch.Tensor):
                codes = member["w"].qweight
                codes.copy_(torch.randint(0, 256, codes.shape, device=self.device))
            elif what == "values" and names:
                leaf = self.leaves[draw.choice(names)]
                leaf.copy_(leaf.flip(0))
            elif what == "place" and names:
                name = draw.choice(names)
                leaf = self.leaves[name]
                moved = _amid_nan(draw, leaf.detach())
                self.leaves[name] = moved.requires_grad_(leaf.requires_grad)
            elif what == "trains":
                leaf = self.leaves[draw.choice(list(self.leaves))]
                leaf.requires_grad_(not leaf.requires_grad)
            elif what == "scaling":
                member["scaling"] = draw.choice((0.5, 3.0, -2.0))

    # ---- the call, and the formula

    def wanted(self):
        return [name for name, leaf in self.leaves.items() if leaf.requires_grad]

    def outputs(self):
        get = {key: [self.leaves.get(f"{i}.{key}") for i in range(len(self.members))] for key in
               ("A", "B", "s", "bias")}  # fmt: skip
        weights, ps = [m["w"] for m in self.members], [m["p"] for m in self.members]
        scalings = [
            m["scaling"] if s is None else s for m, s in zip(self.members, get["s"], strict=True)
        ]
        x, As, Bs, biases = self.leaves["x"], get["A"], get["B"], get["bias"]
        if self.kind == "layer":
            if As[0] is None:
                return [lowbit.matmul(x, weights[0], biases[0])]
            args = x, weights[0], As[0], Bs[0], scalings[0]
            return [lowbit.lora_matmul(*args, bias=biases[0], dropout_p=ps[0])]
        args = x, weights, As, Bs, scalings
        options = {"biases": biases, "dropout_p": ps, "shared_dropout": self.shared}
        if self.kind == "group":
            return list(lowbit.lora_matmul_group(*args, **options))
        return [lowbit.lora_gated_mlp(*args, activation=self.activation, **options)]

    def _seeds(self, key):
        """Those that `outputs` drew behind torch.manual_seed(key)."""
        torch.manual_seed(key)
        seeds = {}
        for some in ([0, 1], [2]) if self.kind == "mlp" else [range(len(self.members))]:
            adapted = [i for i in some if f"{i}.A" in self.leaves]
            for i in adapted:
                share = self.shared and i != adapted[0]
                p = self.members[i]["p"]
                seeds[i] = seeds[adapted[0]] if share else functional._seed(self.leaves["x"], p)
        return seeds

    def formula(self, dtype, key, dys):
        """(outputs, gradients by name) in `dtype`, of operands as the products take them."""
        wide, seeds, wanted = torch.promote_types(dtype, FP32), self._seeds(key), self.wanted()
        T = {}
        for name, leaf in self.leaves.items():
            vector = name.endswith(".s")
            t = leaf.detach().to(wide) if vector else leaf.detach().to(self.dtype).to(dtype)
            T[name] = t.clone().requires_grad_(name in wanted)

        def product(i, x):
            m = self.members[i]
            w = m["w"]
            if not isinstance(w, torch.Tensor):
                w = reference.dequantize_4bit(*w.args(), self.dtype)
            y = x @ w.to(dtype).t()
            if f"{i}.A" in T:
                dropped = x
                if m["p"]:
                    keep = reference.dropout_mask(*x.shape, m["p"], seeds[i]).to(wide)
                    dropped = (x.to(wide) * (keep / (1 - m["p"]))).to(dtype)
                z = (dropped @ T[f"{i}.A"].t()).to(wide) * T.get(f"{i}.s", m["scaling"])
                y = y + z.to(dtype) @ T[f"{i}.B"].t()
            return y + T[f"{i}.bias"] if f"{i}.bias" in T else y

        x = T["x"].reshape(-1, self.K)
        if self.kind == "mlp":
            g, u = product(0, x), product(1, x)
            tanh = "tanh" if self.activation == "gelu_tanh" else "none"
            act = F.silu(g) if self.activation == "silu" else F.gelu(g, approximate=tanh)
            ys = [product(2, act * u)]
        else:
            ys = [product(i, x) for i in range(len(self.members))]
        # Without gaps between rows: torch's 16-bit products with AMX read them (seen in 2.13), and
        # NaN times 0 is NaN.
        dys = [dy.reshape(-1, dy.shape[-1]).contiguous() for dy in dys]
        return ys, gradients(ys, dys, T, wanted)


def gradients(ys, dys, leaves, names):
    """By name; zeros for what nothing depends on."""
    used = [(y, dy.to(y.dtype)) for y, dy in zip(ys, dys, strict=True) if y.requires_grad]
    if not used or not names:
        return {}
    outputs, upstream = zip(*used, strict=True)
    grads = torch.autograd.grad(
        outputs, [leaves[name] for name in names], upstream, allow_unused=True
    )
    pairs = zip(names, grads, strict=True)
    return {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in pairs}
