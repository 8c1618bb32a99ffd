"""What the source of a module's forward says about it: the patterns that lowbit.fuse knows.

attention   self.q_proj(h), self.k_proj(h) and self.v_proj(h), each once, of the same name h, by
            which nothing is changed in place
MLP         self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)), and nothing else
norm        the root-mean-square norm of transformers, statement by statement
rotary      the functions apply_rotary_pos_emb and apply_rotary_pos_emb_vision of transformers, with
            their rotate_half, likewise
pieces      attention of a vision tower: one call of flash attention for all pieces of a packed
            sequence, or else a call of another function for each
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable

QKV = ("q_proj", "k_proj", "v_proj")
ROTARY = "apply_rotary_pos_emb"
VISION_ROTARY = "apply_rotary_pos_emb_vision"
# What attention by pieces finds by name: which of its two ways to take, the longest piece, and who
# has the attention functions.
FLASH, LONGEST, FUNCTIONS = (
    "is_flash_attention_requested",
    "get_max_seqlen",
    "ALL_ATTENTION_FUNCTIONS",
)
_PIECES_ARGUMENTS = {
    "attention_mask": "None",
    "scaling": "self.scaling",
    "cu_seq_lens_q": "cu_seqlens",
    "cu_seq_lens_k": "cu_seqlens",
    "is_causal": "False",
}
_PIECES_OTHERS = {"dropout", "max_length_q", "max_length_k", None}  # None: **kwargs
_NORM = """
input_dtype = hidden_states.dtype
hidden_states = hidden_states.to(torch.float32)
variance = hidden_states.pow(2).mean(-1, keepdim=True)
hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
return self.weight * hidden_states.to(input_dtype)
"""
_ROTARY = """
cos = cos.unsqueeze(unsqueeze_dim)
sin = sin.unsqueeze(unsqueeze_dim)
q_embed = q * cos + rotate_half(q) * sin
k_embed = k * cos + rotate_half(k) * sin
return (q_embed, k_embed)
"""
_VISION_ROTARY = """
orig_q_dtype = q.dtype
orig_k_dtype = k.dtype
q, k = q.float(), k.float()
cos, sin = cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float()
q_embed = q * cos + rotate_half(q) * sin
k_embed = k * cos + rotate_half(k) * sin
q_embed = q_embed.to(orig_q_dtype)
k_embed = k_embed.to(orig_k_dtype)
return (q_embed, k_embed)
"""
_ROTATE_HALF = """
x1 = x[..., :x.shape[-1] // 2]
x2 = x[..., x.shape[-1] // 2:]
return torch.cat((-x2, x1), dim=-1)
"""


@functools.cache
def _source(function: Callable) -> ast.FunctionDef | None:
    """The definition of a function, or None if it cannot be found."""
    try:
        parsed = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = parsed.body[0]
    return definition if isinstance(definition, ast.FunctionDef) else None


def _names(definition: ast.FunctionDef) -> list[str] | None:
    """Its arguments, or None if there are *args or **kwargs."""
    arguments = definition.args
    if arguments.vararg or arguments.kwarg:
        return None
    return [argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)]


def _body(definition: ast.FunctionDef) -> list[ast.stmt]:
    """The statements, without a docstring."""
    return [node for node in definition.body if not _is_docstring(node)]


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _does(function: Callable, names: list[str], statements: str) -> bool:
    """Whether a function takes these arguments and consists of these statements."""
    definition = _source(function)
    if definition is None or _names(definition) != names:
        return False
    expected = [ast.dump(node) for node in ast.parse(statements).body]
    return [ast.dump(node) for node in _body(definition)] == expected


@functools.cache
def is_rms_norm(forward: Callable) -> bool:
    """Whether a forward is the pattern of the norm."""
    undecorated = not hasattr(forward, "__wrapped__")
    return undecorated and _does(forward, ["self", "hidden_states"], _NORM)


def uses_rotary(forward: Callable) -> bool:
    """Whether the rotation that a forward calls by its usual name is transformers' own."""
    if not inspect.isfunction(forward):
        return False
    decorated = getattr(forward, "__wrapped__", None)
    if decorated is not None:
        cells = forward.__closure__ or ()
        return any(c.cell_contents is decorated for c in cells) and uses_rotary(decorated)
    function = forward.__globals__.get(ROTARY)
    return _rotates(function, ["q", "k", "cos", "sin", "unsqueeze_dim"], _ROTARY)


def uses_vision_rotary(forward: Callable) -> bool:
    """The same of the rotation that vision towers call."""
    function = forward.__globals__.get(VISION_ROTARY)
    return _rotates(function, ["q", "k", "cos", "sin"], _VISION_ROTARY)


def _rotates(function: object, names: list[str], statements: str) -> bool:
    rotate_half = getattr(function, "__globals__", {}).get("rotate_half")
    return (
        inspect.isfunction(function)
        and inspect.isfunction(rotate_half)
        and _does(function, names, statements)
        and _does(rotate_half, ["x"], _ROTATE_HALF)
    )


@functools.cache
def is_gated_mlp(forward: Callable) -> bool:
    """Whether a forward is the pattern of the MLP, as one expression or through one variable."""
    definition = _source(forward)
    if definition is None or definition.decorator_list or hasattr(forward, "__wrapped__"):
        return False  # the source does not say what a decorator does
    names, body = _names(definition), _body(definition)
    if names is None or len(names) != 2 or not 1 <= len(body) <= 2:
        return False
    if not isinstance(body[-1], ast.Return):
        return False
    value = body[-1].value
    if len(body) == 2:
        if not isinstance(body[0], ast.Assign) or len(body[0].targets) != 1:
            return False
        if ast.dump(body[0].targets[0]) != ast.dump(_stored(value)):
            return False
        value = body[0].value
    this, x = names
    pattern = f"{this}.down_proj({this}.act_fn({this}.gate_proj({x})) * {this}.up_proj({x}))"
    return value is not None and ast.unparse(value) == pattern


def _stored(node: ast.expr | None) -> ast.AST:
    """A name as the target of an assignment; anything else as it is."""
    return ast.Name(node.id, ast.Store()) if isinstance(node, ast.Name) else ast.Pass()


@functools.cache
def is_attention(forward: Callable) -> bool:
    """Whether a forward calls the three projections once each, on one name, and works for a
    stand-in: it neither stores attributes nor calls super(), nor changes what the name means in
    place, after which the projections would read another x.
    """
    definition = _source(forward)
    if definition is None or not definition.args.args:
        return False
    this = definition.args.args[0].arg
    read: dict[str, list[str]] = {name: [] for name in QKV}
    mentions = 0
    for node in ast.walk(definition):
        if isinstance(node, ast.Name) and node.id == "super":
            return False
        if isinstance(node, ast.Attribute) and _is_name(node.value, this):
            if not isinstance(node.ctx, ast.Load):
                return False
            mentions += node.attr in QKV
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            callee = node.func
            if _is_name(callee.value, this) and callee.attr in QKV:
                if len(node.args) != 1 or node.keywords or not isinstance(node.args[0], ast.Name):
                    return False
                read[callee.attr].append(node.args[0].id)
    inputs = [name for names in read.values() for name in names]
    each_once = all(len(names) == 1 for names in read.values())
    if not each_once or mentions != len(QKV) or len(set(inputs)) != 1:
        return False
    return not any(_changes(node, inputs[0]) for node in ast.walk(definition))


def _changes(node: ast.AST, name: str) -> bool:
    """Whether a node changes the tensor of that name in place, by itself or as `out`."""
    if isinstance(node, ast.AugAssign):
        return _is_name(_indexed(node.target), name)
    if isinstance(node, (ast.Subscript, ast.Attribute)):
        return not isinstance(node.ctx, ast.Load) and _is_name(_indexed(node), name)
    if not isinstance(node, ast.Call):
        return False
    method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    in_place = method.endswith("_") and not method.endswith("__")
    if in_place and _is_name(_indexed(node.func.value), name):
        return True
    return any(k.arg == "out" and _is_name(_indexed(k.value), name) for k in node.keywords)


def _indexed(node: ast.expr) -> ast.expr:
    """h of h, h[i] and h.data."""
    while isinstance(node, (ast.Subscript, ast.Attribute)):
        node = node.value
    return node


@functools.cache
def attends_by_pieces(forward: Callable) -> bool:
    """Whether a forward leaves pieces to flash attention, in one call that says nothing but where
    they are, or else splits q, k and v.
    """
    definition = _source(forward)
    if definition is None or definition.decorator_list or hasattr(forward, "__wrapped__"):
        return False
    globals_ = getattr(forward, "__globals__", {})
    if not all(_is_of_transformers(globals_.get(name)) for name in (FLASH, LONGEST, FUNCTIONS)):
        return False
    choices = [
        node
        for node in definition.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == f"{FLASH}(self.config)"
    ]
    if len(choices) != 1:
        return False
    calls = [n for s in choices[0].body for n in ast.walk(s) if isinstance(n, ast.Call)]
    packed = [call for call in calls if any(k.arg == "cu_seq_lens_q" for k in call.keywords)]
    split = "lengths = cu_seqlens[1:] - cu_seqlens[:-1]"
    if len(packed) != 1 or split not in map(ast.unparse, choices[0].orelse):
        return False
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in packed[0].keywords}
    said = {name: given.pop(name, None) for name in _PIECES_ARGUMENTS}
    return said == _PIECES_ARGUMENTS and set(given) <= _PIECES_OTHERS


def _is_of_transformers(value: object) -> bool:
    kind = value if inspect.isfunction(value) else type(value)
    return kind.__module__.partition(".")[0] == "transformers"


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
