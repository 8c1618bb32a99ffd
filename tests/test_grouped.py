"""lowbit.lora_matmul_group against separate layers, against float64, and the contract around it."""

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
from helpers import assert_bitwise_equal, assert_close_to_float64
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit import dispatch, reference

M, K = 80, 100  # more than the few tokens that are never stacked; the last block of a row is short


@pytest.fixture(params=list(WAYS))
def way(request, monkeypatch):
    choose_way(monkeypatch, request.param)
    return request.param


def _problem(dtype, device, **options):
    """x, members and dys: differing widths and ranks, one with a vector, one without adapter."""
    members = [
        make_member(48, K, 4, dtype, device, **options),
        make_member(24, K, 8, dtype, device, bias=False, vector=True, **options),
        make_member(72, K, 0, dtype, device, **options),
        make_member(24, K, 4, dtype, device, **options),
    ]
    x = torch.randn(M, K).to(device, dtype)
    return x, members, [torch.randn(M, m["w"].N).to(device, dtype) for m in members]


def _grouped(x, members, dys, frozen=(), **options):
    x, members, named = leaves_of(x, members, frozen=frozen)
    columns, biases = arguments(members)
    torch.manual_seed(7)
    ys = lowbit.lora_matmul_group(x, *columns, biases=biases, **options)
    return gradients(ys, dys, named)


def _separate(x, members, dys, frozen=(), dropout_p=0.0):
    x, members, named = leaves_of(x, members, frozen=frozen)
    torch.manual_seed(7)
    return gradients([separate(x, m, dropout_p) for m in members], dys, named)


def _formula(x, members, dys, dtype, keeps=None):
    x, members, named = leaves_of(x, members, dtype, "cpu")
    keeps = [None] * len(members) if keeps is None else keeps
    ys = [formula(x, m, keep) for m, keep in zip(members, keeps, strict=True)]
    return gradients(ys, [dy.to("cpu", dtype) for dy in dys], named)


def _compare(actual, exact, plain):
    assert actual.keys() == exact.keys()
    for name in actual:
        factor = 2.0 if name.startswith("y") else 3.0
        assert_close_to_float64(name, actual[name], exact[name], plain[name], factor)


def _assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (value is None) == (actual[name] is None), name
        if value is not None:
            assert_bitwise_equal(actual[name], value, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_and_every_gradient(device, dtype, way):
    problem = _problem(dtype, device)
    _compare(_grouped(*problem), _formula(*problem, torch.float64), _formula(*problem, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fp32_masters(device, dtype, way):
    problem = _problem(dtype, device, lora_dtype=torch.float32)
    actual = _grouped(*problem)
    assert actual["d_0.lora_A"].dtype == actual["d_3.lora_B"].dtype == torch.float32
    _compare(actual, _formula(*problem, torch.float64), _formula(*problem, dtype))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_member_by_member_the_bits_are_those_of_separate_calls(
    device, dtype, dropout_p, monkeypatch
):
    choose_way(monkeypatch, "member by member")
    problem = _problem(dtype, device)
    _assert_same(_grouped(*problem, dropout_p=dropout_p), _separate(*problem, dropout_p=dropout_p))


def _mask(dropout_p, device, size=(M, K)):
    seed = torch.randint(-(2**63 - 1), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    return reference.dropout_mask(*size, dropout_p, seed.cpu()) / (1 - dropout_p)


@pytest.mark.parametrize("frozen", [(), ("x",)])
def test_kernels_that_add_to_dx_are_given_the_sum(monkeypatch, frozen):
    """Where a kernel adds dx itself, the first member makes it and the others add, though z
    comes from a stacked product.
    """
    choose_way(monkeypatch, "stacked")
    sums = []

    def adding(operation, args):
        run = dispatch.select(operation, args)

        def add(*args, dx_sum=None):
            results = run(*args)
            sums.append(dx_sum is not None)
            if dx_sum is None:
                return results
            single = isinstance(results, torch.Tensor)
            dx_sum.add_(results if single else results[0])
            return None if single else (None, *results[1:])

        return add

    monkeypatch.setattr(dispatch, "adding_dx", adding)
    problem = _problem(torch.float32, "cpu")
    actual, expected = _grouped(*problem, frozen=frozen), _separate(*problem, frozen=frozen)
    assert sums.count(True) == (0 if frozen else 3)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_each_member_has_its_own_mask(device, way):
    """Drawn in the order of the members that have one; some may drop less, or nothing."""
    problem, ps = _problem(torch.float32, device), [0.3, 0.0, 0.5, 0.5]
    torch.manual_seed(7)
    keeps = [_mask(0.3, device), None, None, _mask(0.5, device)]
    exact, plain = (_formula(*problem, t, keeps) for t in (torch.float64, torch.float32))
    _compare(_grouped(*problem, dropout_p=ps), exact, plain)


def test_shared_dropout_is_one_mask(device, way):
    problem = _problem(torch.float32, device)
    torch.manual_seed(7)
    keeps = [_mask(0.3, device)] * 4
    exact, plain = (_formula(*problem, t, keeps) for t in (torch.float64, torch.float32))
    _compare(_grouped(*problem, dropout_p=0.3, shared_dropout=True), exact, plain)


def test_only_what_is_asked_for_is_computed(device, way):
    """Every leaf alone, and all but each: the gradients are those of separate calls."""
    problem = _problem(torch.float32, device)
    _, _, named = leaves_of(*problem[:2])
    names = set(named)
    for name in sorted(names):
        for frozen in (names - {name}, {name}):
            actual, expected = (f(*problem, frozen=frozen) for f in (_grouped, _separate))
            assert actual.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(
                    actual[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
                )


def test_unused_outputs_have_no_gradient(device, way):
    x, members, named = leaves_of(*_problem(torch.float32, device)[:2])
    columns, biases = arguments(members)
    ys = lowbit.lora_matmul_group(x, *columns, biases=biases)
    actual = gradients([ys[1]], [torch.ones_like(ys[1])], named)
    expected = gradients([separate(x, members[1])], [torch.ones_like(ys[1])], named)
    for name, value in expected.items():
        assert (value is None) == (actual[name] is None), name
        if value is not None:
            torch.testing.assert_close(actual[name], value)


def test_without_gradients_the_values_are_the_same(device, way):
    x, members, _ = _problem(torch.bfloat16, device)
    columns, biases = arguments(members)
    with_gradients = _grouped(x, members, [torch.zeros(M, m["w"].N).to(x) for m in members])
    for i, y in enumerate(lowbit.lora_matmul_group(x, *columns, biases=biases)):
        assert not y.requires_grad
        assert_bitwise_equal(y, with_gradients[f"y{i}"], f"y{i}")


def test_an_output_of_what_is_frozen_needs_no_gradient(device, way):
    x, members, _ = _problem(torch.float32, device)
    members[0]["lora_A"].requires_grad_()
    columns, biases = arguments(members)
    ys = lowbit.lora_matmul_group(x, *columns, biases=biases)
    assert [y.requires_grad for y in ys] == [True] + [False] * (len(members) - 1)


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_product_from_a_given_z_on_every_backend(device, backend, dtype):
    """linear_low_rank, which stacked members use: y = x W^T + bias + (z * s) B^T."""
    why = dispatch.unavailable(backend)
    if why is None and backend in ("cpu", "cuda") and backend != device.type:
        why = f"{backend} does not run on {device.type}"
    if why is not None:
        pytest.skip(why)
    for vector in (False, True):
        m = make_member(48, K, 4, dtype, device, vector=vector)
        x, z = torch.randn(17, K).to(device, dtype), torch.randn(17, 4).to(device, dtype)
        scaling = (m["scaling"], 1.0) if vector else (None, 2.0)
        args = (x, *m["w"].args(), z, m["lora_B"], *scaling, m["bias"])
        with dispatch.force(backend):
            actual = torch.ops.lowbit.linear_low_rank(*args)

        def plain(dtype, m=m, x=x, z=z):
            base = {"w": m["w"], "bias": m["bias"]}
            low_rank = (z.to(dtype) * m["scaling"]).to(dtype) @ m["lora_B"].to(dtype).t()
            return formula(x.to(dtype), base) + low_rank

        assert_close_to_float64("y", actual, plain(torch.float64), plain(dtype))


def _saved(function):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append((tuple(t.shape), t.data_ptr())) or t, lambda t: t
    ):
        y = function()
    return sizes, y


def test_x_is_saved_once_and_only_for_lora_A(device, way):
    x, members, _ = _problem(torch.float32, device)
    for frozen, count in (((), 1), (tuple(f"{i}.lora_A" for i in range(4)), 0)):
        fresh_x, fresh, _ = leaves_of(x, members, frozen=frozen)
        columns, biases = arguments(fresh)
        sizes, _ = _saved(
            lambda c=columns, b=biases, v=fresh_x: lowbit.lora_matmul_group(v, *c, biases=b)
        )
        assert [shape for shape, _ in sizes].count((M, K)) == count
        assert not any(shape == (M, m["w"].N) for shape, _ in sizes for m in members)
        packed = {m["w"].qweight.data_ptr() for m in members}
        assert not packed & {pointer for _, pointer in sizes}  # the modules' own, not to be moved
        trained = {m["lora_B"].data_ptr() for m in fresh if "lora_B" in m}
        assert trained <= {pointer for _, pointer in sizes}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_replays_dropout(device, use_reentrant, way):
    x, members, dys = _problem(torch.float32, device)
    plain = _grouped(x, members, dys, dropout_p=0.4)
    x, members, named = leaves_of(x, members)
    columns, biases = arguments(members)
    torch.manual_seed(7)
    ys = checkpoint(
        lambda x: lowbit.lora_matmul_group(x, *columns, biases=biases, dropout_p=0.4),
        x,
        use_reentrant=use_reentrant,
    )
    torch.autograd.backward(ys, dys)
    for name, leaf in named.items():
        if plain[f"d_{name}"] is not None:
            assert_bitwise_equal(leaf.grad, plain[f"d_{name}"], name)


def test_autocast(device, way):
    """As with separate calls, and backward may run inside the context too."""
    x, members, _ = _problem(torch.float32, device)
    for inside in (False, True):
        fresh_x, fresh, named = leaves_of(x, members)
        columns, biases = arguments(fresh)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            ys = lowbit.lora_matmul_group(fresh_x, *columns, biases=biases)
            expected = [separate(fresh_x, m) for m in fresh]
            assert all(y.dtype == torch.bfloat16 for y in ys)
            if inside:
                ones = [torch.ones_like(y) for y in ys]
                actual = gradients(ys, ones, named)
        if not inside:
            actual = gradients(ys, ones := [torch.ones_like(y) for y in ys], named)
        for name, value in gradients(expected, ones, named).items():
            assert actual[name].dtype == value.dtype, name
            torch.testing.assert_close(actual[name], value, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_compiles_without_graph_breaks(device, dropout_p, way):
    torch.compiler.reset()
    x, members, dys = _problem(torch.float32, device)
    x, members, named = leaves_of(x, members)

    def step(x, tensors):
        layers = [tensors[i] | {"w": m["w"]} for i, m in enumerate(members)]
        columns, biases = arguments(layers)
        return lowbit.lora_matmul_group(x, *columns, biases=biases, dropout_p=dropout_p)

    tensors = [{k: v for k, v in m.items() if k != "w"} for m in members]
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(7)
        results.append(gradients(function(x, tensors), dys, named))
    if dropout_p == 0.0:
        _assert_same(results[1], results[0])


def test_batch_shapes_strides_empty_and_single(device, way):
    x, members, _ = _problem(torch.float32, device)
    columns, biases = arguments(members)
    flat = lowbit.lora_matmul_group(x, *columns, biases=biases)
    for shaped in (x.view(4, 20, K), x.view(4, 20, K).transpose(0, 1).contiguous().transpose(0, 1)):
        for y, expected in zip(
            lowbit.lora_matmul_group(shaped, *columns, biases=biases), flat, strict=True
        ):
            torch.testing.assert_close(y, expected.view(4, 20, -1))
    assert lowbit.lora_matmul_group(x[0], *columns)[2].shape == (72,)
    empty = x[:0].view(0, 3, K).requires_grad_()
    ys = lowbit.lora_matmul_group(empty, *columns, biases=biases)
    sum(y.sum() for y in ys).backward()
    assert [y.shape for y in ys] == [(0, 3, m["w"].N) for m in members]
    assert empty.grad.shape == empty.shape
    (only,) = lowbit.lora_matmul_group(x, *[column[:1] for column in columns], biases=biases[:1])
    torch.testing.assert_close(only, flat[0])


def test_dense_weights(device, way):
    x, members, _ = _problem(torch.float32, device)
    dense = [m | {"w": m["w"].dequantize(torch.float32)} for m in members]
    columns, biases = arguments(dense)
    for y, m in zip(lowbit.lora_matmul_group(x, *columns, biases=biases), members, strict=True):
        torch.testing.assert_close(y, separate(x, m), rtol=1e-4, atol=1e-5)


def test_retain_graph_and_second_derivatives(device, way):
    x, members, _ = _problem(torch.float32, device)
    x, members, _ = leaves_of(x, members)
    before = x.detach().clone()
    columns, _ = arguments(members)
    total = sum(y.square().sum() for y in lowbit.lora_matmul_group(x, *columns))
    first = torch.autograd.grad(total, x, retain_graph=True)[0]
    (second,) = torch.autograd.grad(total, x, create_graph=True)
    assert_bitwise_equal(second.detach(), first, "dx")
    assert_bitwise_equal(x.detach(), before, "x")
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weights": []}, ValueError, "weights must have at least one member"),
        ({"weights": None}, TypeError, "weights must be a list .* got NoneType"),
        ({"lora_As": None}, TypeError, "lora_As must be a list .* got NoneType"),
        ({"lora_As": [None]}, ValueError, "lora_As must have one entry per weight, 2, got 1"),
        ({"scalings": [1.0] * 3}, ValueError, "scalings must have one entry per weight, 2, got 3"),
        ({"dropout_p": [0.1]}, ValueError, "dropout_p must have one entry per weight"),
        ({"dropout_p": [0.1, 1.0]}, ValueError, r"member 1: dropout_p must lie in \[0, 1\)"),
        ({"dropout_p": "0.1"}, TypeError, "member 0: dropout_p must be a number"),
        ({"scalings": [1.0, "2"]}, TypeError, "member 1: scaling must be a number"),
        ({"lora_Bs": [None, None]}, ValueError, "member 0: lora_A and lora_B must both be given"),
        ({"biases": [None, torch.ones(3)]}, ValueError, r"member 1: bias must be \[N\] = \[24\]"),
        (
            {"dropout_p": [0.1, 0.2], "shared_dropout": True},
            ValueError,
            "shared_dropout needs one dropout_p for all",
        ),
        ({"x": torch.ones(3, 8)}, ValueError, r"member 0: x must be \[\.\.\., K\] with K = 100"),
        ({"x": torch.ones(3, K, dtype=torch.int8)}, TypeError, "x must be a float32"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    members = [make_member(n, K, 4, torch.float32, "cpu") for n in (48, 24)]
    columns, biases = arguments(members)
    call = dict(zip(("weights", "lora_As", "lora_Bs", "scalings"), columns, strict=True))
    call |= {"x": torch.randn(3, K), "biases": biases}
    with pytest.raises(error, match=message):
        lowbit.lora_matmul_group(**(call | changes))
