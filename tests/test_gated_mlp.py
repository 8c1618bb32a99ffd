"""lowbit.lora_gated_mlp against three separate layers, against float64, and what it saves."""

import pytest
import torch
from grouping import (
    WAYS,
    arguments,
    choose_way,
    formula,
    gradients,
    leaves_of,
    make_member,
    separate,
)
from helpers import assert_bitwise_equal, assert_close_to_float64, relative_rms
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit import gated_mlp, group_products, reference

M, K, H = 70, 64, 100
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
}


@pytest.fixture(params=list(WAYS))
def way(request, monkeypatch):
    choose_way(monkeypatch, request.param)
    return request.param


def _problem(dtype, device, *, ranks=(4, 8, 4), **options):
    sizes = ((H, K), (H, K), (K, H))
    members = [
        make_member(*size, r, dtype, device, vector=i == 1, **options)
        for i, (size, r) in enumerate(zip(sizes, ranks, strict=True))
    ]
    return torch.randn(M, K).to(device, dtype), members, torch.randn(M, K).to(device, dtype)


def _fused(x, members, dy, frozen=(), **options):
    x, members, named = leaves_of(x, members, frozen=frozen)
    columns, biases = arguments(members)
    torch.manual_seed(7)
    return gradients([lowbit.lora_gated_mlp(x, *columns, biases=biases, **options)], [dy], named)


def _separate(x, members, dy, frozen=(), activation="silu", dropout_p=0.0):
    x, members, named = leaves_of(x, members, frozen=frozen)
    torch.manual_seed(7)
    act = ACTIVATIONS[activation]
    h = act(separate(x, members[0], dropout_p)) * separate(x, members[1], dropout_p)
    return gradients([separate(h, members[2], dropout_p)], [dy], named)


def _formula(x, members, dy, dtype, activation="silu", keeps=(None, None, None)):
    x, members, named = leaves_of(x, members, dtype, "cpu")
    gate, up = (formula(x, m, keep) for m, keep in zip(members[:2], keeps[:2], strict=True))
    y = formula(ACTIVATIONS[activation](gate) * up, members[2], keeps[2])
    return gradients([y], [dy.to("cpu", dtype)], named)


def _compare(actual, exact, plain):
    assert actual.keys() == exact.keys()
    for name in actual:
        factor = 2.0 if name == "y0" else 3.0
        assert_close_to_float64(name, actual[name], exact[name], plain[name], factor)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_and_every_gradient(device, dtype, activation, way):
    problem = _problem(dtype, device)
    exact, plain = (_formula(*problem, t, activation) for t in (torch.float64, dtype))
    _compare(_fused(*problem, activation=activation), exact, plain)


@pytest.mark.parametrize("ranks", [(4, 0, 0), (0, 0, 0), (0, 4, 8)], ids=str)
def test_layers_without_adapter_and_fp32_masters(device, ranks, way):
    dtype = torch.bfloat16
    problem = _problem(dtype, device, ranks=ranks, lora_dtype=torch.float32)
    _compare(_fused(*problem), _formula(*problem, torch.float64), _formula(*problem, dtype))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_member_by_member_the_bits_are_those_of_separate_layers(
    device, dtype, dropout_p, activation, monkeypatch
):
    choose_way(monkeypatch, "member by member")
    problem, options = _problem(dtype, device), {"activation": activation, "dropout_p": dropout_p}
    actual, expected = _fused(*problem, **options), _separate(*problem, **options)
    for name, value in expected.items():
        assert_bitwise_equal(actual[name], value, name)


def _mask(dropout_p, device, size):
    seed = torch.randint(-(2**63 - 1), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    return reference.dropout_mask(*size, dropout_p, seed.cpu()) / (1 - dropout_p)


@pytest.mark.parametrize("of_down", [0.3, 0.1])
@pytest.mark.parametrize("shared", [False, True])
def test_dropout_matches_its_masks(device, shared, of_down, way):
    problem = _problem(torch.float32, device)
    torch.manual_seed(7)
    first = _mask(0.3, device, (M, K))
    second = first if shared else _mask(0.3, device, (M, K))
    keeps = (first, second, _mask(of_down, device, (M, H)))
    exact, plain = (_formula(*problem, t, keeps=keeps) for t in (torch.float64, torch.float32))
    options = {"dropout_p": (0.3, 0.3, of_down), "shared_dropout": shared}
    _compare(_fused(*problem, **options), exact, plain)


def test_only_what_is_asked_for_is_computed(device, way):
    """Every leaf alone, and all but each: the gradients are those of separate layers."""
    problem = _problem(torch.float32, device)
    names = set(leaves_of(*problem[:2])[2])
    for name in sorted(names):
        for frozen in (names - {name}, {name}):
            actual, expected = (f(*problem, frozen=frozen) for f in (_fused, _separate))
            assert actual.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(
                    actual[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
                )


@pytest.mark.parametrize(
    ("trained", "wide", "x_saved"),
    [
        ("all", 2, 1),
        ("2.lora_A", 2, 0),
        ("2.lora_B", 0, 0),
        ("0.lora_B", 2, 0),
        ("1.lora_A", 2, 1),
        ("x", 2, 0),
    ],
)
def test_what_is_saved(device, trained, wide, x_saved, way):
    """Of tensors as wide as the hidden layer gate(x) and up(x), or none; x once, or not at all."""
    x, members, _ = _problem(torch.float32, device)
    names = set(leaves_of(x, members)[2])
    frozen = () if trained == "all" else names - {trained}
    x, members, _ = leaves_of(x, members, frozen=frozen)
    columns, biases = arguments(members)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t
    ):
        lowbit.lora_gated_mlp(x, *columns, biases=biases)
    assert shapes.count((M, H)) == wide
    assert shapes.count((M, K)) == x_saved


def test_backward_leaves_what_it_was_given_alone(device, way):
    """Gradients and saved tensors are not written into: twice gives the same."""
    x, members, dy = _problem(torch.float32, device)
    x, members, named = leaves_of(x, members)
    columns, biases = arguments(members)
    y = lowbit.lora_gated_mlp(x, *columns, biases=biases)
    leaves, before = list(named.values()), dy.clone()
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    for name, a, b in zip(named, first, torch.autograd.grad(y, leaves, dy), strict=True):
        assert_bitwise_equal(a, b, name)
    assert_bitwise_equal(dy, before, "dy")


def test_without_gradients_the_value_is_the_same(device, way):
    x, members, dy = _problem(torch.bfloat16, device)
    columns, biases = arguments(members)
    with torch.no_grad():
        y = lowbit.lora_gated_mlp(x, *columns, biases=biases)
    assert_bitwise_equal(y, _fused(x, members, dy)["y0"], "y")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_replays_dropout(device, use_reentrant, way):
    x, members, dy = _problem(torch.float32, device)
    plain = _fused(x, members, dy, dropout_p=0.4)
    x, members, named = leaves_of(x, members)
    columns, biases = arguments(members)
    torch.manual_seed(7)
    checkpoint(
        lambda x: lowbit.lora_gated_mlp(x, *columns, biases=biases, dropout_p=0.4),
        x,
        use_reentrant=use_reentrant,
    ).backward(dy)
    for name, leaf in named.items():
        assert_bitwise_equal(leaf.grad, plain[f"d_{name}"], name)


def test_recomputation_stops_before_the_last_product(device, monkeypatch):
    """Where y has a function of its own: nothing that backward needs comes after it."""
    choose_way(monkeypatch, "stacked")
    calls = []

    def counted(h, z, member):
        calls.append(member)
        return group_products.product(h, z, member)

    monkeypatch.setattr(gated_mlp, "product", counted)
    x, members, dy = _problem(torch.float32, device)
    x, members, _ = leaves_of(x, members)
    columns, biases = arguments(members)

    def block(x):
        return x + lowbit.lora_gated_mlp(x, *columns, biases=biases)

    y = checkpoint(block, x, use_reentrant=False)
    assert len(calls) == 1
    y.backward(dy)
    assert len(calls) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_elementwise_steps_in_one_pass(dtype, monkeypatch):
    """The Triton kernels give what torch's operations give, but for the last bits of exp."""
    pytest.importorskip("triton")
    problem = _problem(dtype, "cuda")
    results = []
    for elements in (1, 1 << 40):
        monkeypatch.setattr(gated_mlp, "ONE_PASS_ELEMENTS", elements)
        results.append(_fused(*problem))
    for name, expected in results[1].items():
        limit = 1e-5 if dtype == torch.float32 else 2e-3
        assert relative_rms(results[0][name], expected) <= limit, name


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(device, inside, way):
    """As with separate layers, whether backward runs inside the context or not."""
    x, members, dy = _problem(torch.float32, device)
    x, members, named = leaves_of(x, members)
    columns, biases = arguments(members)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = lowbit.lora_gated_mlp(x, *columns, biases=biases)
        g, u = separate(x, members[0]), separate(x, members[1])
        expected = separate(F.silu(g) * u, members[2])
        if inside:
            actual = gradients([y], [dy.bfloat16()], named)
    if not inside:
        actual = gradients([y], [dy.bfloat16()], named)
    for name, value in gradients([expected], [dy.bfloat16()], named).items():
        assert actual[name].dtype == value.dtype, name
        error = (actual[name] - value).float().norm() / value.float().norm()
        assert error < 0.02, f"{name}: {error}"


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_compiles_without_graph_breaks(device, activation, way):
    torch.compiler.reset()
    x, members, dy = _problem(torch.float32, device)
    x, members, named = leaves_of(x, members)
    columns, biases = arguments(members)

    def step(x, As, Bs, biases):
        return lowbit.lora_gated_mlp(
            x, columns[0], As, Bs, columns[3], biases=biases, activation=activation
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = [
        gradients([function(x, columns[1], columns[2], biases)], [dy], named)
        for function in (step, compiled)
    ]
    for name, value in results[0].items():
        assert_bitwise_equal(results[1][name], value, name)


def test_batch_shapes_and_empty(device, way):
    x, members, _ = _problem(torch.float32, device)
    columns, biases = arguments(members)
    flat = lowbit.lora_gated_mlp(x, *columns, biases=biases)
    batched = lowbit.lora_gated_mlp(x.view(2, 35, K), *columns, biases=biases)
    torch.testing.assert_close(batched.view(M, K), flat)
    assert lowbit.lora_gated_mlp(x[0], *columns, biases=biases).shape == (K,)
    empty = x[:0].view(0, 3, K).requires_grad_()
    y = lowbit.lora_gated_mlp(empty, *columns, biases=biases)
    y.sum().backward()
    assert y.shape == empty.grad.shape == (0, 3, K)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "relu"}, "activation must be one of silu, gelu, gelu_tanh, got 'relu'"),
        ({"drop": 1}, "weights must be those of gate, up and down, got 2"),
        ({"up": 99}, r"up must be \[H, K\] and down \[N, H\] with gate's H = 100, got \[99, 64\]"),
        ({"dropout_p": (0.0, 0.0, 1.5)}, r"down: dropout_p must lie in \[0, 1\), got 1.5"),
        ({"x": 63}, r"gate: x must be \[\.\.\., K\] with K = 64, got \[3, 63\]"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    sizes = ((H, K), (changes.get("up", H), K), (K, H))[: 3 - changes.get("drop", 0)]
    columns, _ = arguments([make_member(*size, 4, torch.float32, "cpu") for size in sizes])
    options = {k: v for k, v in changes.items() if k in ("activation", "dropout_p")}
    with pytest.raises(ValueError, match=message):
        lowbit.lora_gated_mlp(torch.randn(3, changes.get("x", K)), *columns, **options)
