"""lowbit.optim on the CPU and on a GPU: the arithmetic, torch.optim's interface, bad input.

lowbit/optim/reference.py is the definition; the kernels equal it bit for bit, on every instruction
set. torch.optim.AdamW is the second opinion.
"""

import math

import pytest
import torch
from helpers import assert_bitwise_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_cases import CLASSES, give_gradients, make_parameters

import lowbit.optim as optim
from lowbit import _library
from lowbit.optim import base, clipping, packing, reference, tables

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

needs_cpu_library = pytest.mark.skipif(
    not _library.available("cpu"), reason="the compiled CPU library is not there"
)


def _name(value):
    return getattr(value, "__name__", str(value).removeprefix("torch."))


def _train(cls, parameters, steps=5, *, wide=False, grad_scale=None, **options):
    optimizer = cls(parameters, lr=1e-2, seed=5, **options)
    if grad_scale is not None:  # as a GradScaler leaves it
        optimizer.grad_scale = torch.tensor(grad_scale, device=parameters[0].device)
    for step in range(steps):
        give_gradients(parameters, step)
        if wide:
            for p in parameters:
                sizes = 10.0 ** torch.linspace(-38, 18, p.numel()).roll(step * 7001)
                p.grad = (p.grad * sizes.view(p.shape).to(p.device)).to(p.dtype)
        if step == 3:
            parameters[1].grad = None  # sits one step out: its count falls behind
        optimizer.step()
    return optimizer


def _use_reference(monkeypatch):
    for module in (packing, base, clipping):
        monkeypatch.setattr(module, "operators", lambda device: None)


def _assert_same(a, b, optimizer_a, optimizer_b):
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        assert_bitwise_equal(p.detach().cpu(), q.detach().cpu(), f"parameter {i}")
        for key, value in optimizer_a.state[p].items():
            assert_bitwise_equal(value.cpu(), optimizer_b.state[q][key].cpu(), f"{key} of {i}")


# ---- arithmetic ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("cls", CLASSES, ids=_name)
def test_kernels_equal_the_reference(cls, dtype, stochastic, device, monkeypatch):
    a, b = make_parameters(dtype=dtype, device=device), make_parameters(dtype=dtype)
    options = {"stochastic_rounding": stochastic, "maximize": stochastic}
    compiled = _train(cls, a, **options)
    _use_reference(monkeypatch)
    _assert_same(a, b, compiled, _train(cls, b, **options))


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("cls", CLASSES, ids=_name)
def test_gradients_of_any_size_equal_the_reference(cls, steps, device, monkeypatch):
    """Roots and quotients near both ends of fp32 and beyond, by a scale that is no power of two. A
    single step starts at zero, where no update is too small to be seen.
    """
    a, b = make_parameters(device=device), make_parameters()
    if steps == 1:
        for p in (*a, *b):
            p.detach().zero_()
    options = {"steps": steps, "wide": True, "grad_scale": 3.0}
    compiled = _train(cls, a, **options)
    _use_reference(monkeypatch)
    _assert_same(a, b, compiled, _train(cls, b, **options))


def test_opcheck_of_every_operator(device, monkeypatch):
    """The schemas name what is written; addresses in tables are hidden from them, and nothing here
    is traced or differentiated.
    """
    compiled, seen = packing.operators(device), set()
    if compiled is None:
        pytest.skip("the compiled library is not there")

    class Checked:
        def __getattr__(self, name):
            operator = getattr(compiled, name)

            def call(*arguments):
                seen.add(name)
                torch.library.opcheck(operator.default, arguments, test_utils="test_schema")
                return operator(*arguments)

            return call

    for module in (packing, base, clipping):
        monkeypatch.setattr(module, "operators", lambda device: Checked())
    parameters = make_parameters(dtype=torch.bfloat16, device=device)
    optimizer = _train(optim.PagedAdamW8bit, parameters, steps=2, skip_nonfinite=True)
    optim.clip_grad_norm_(parameters, 1.0)
    assert optimizer.state[parameters[0]]["step"] > 0
    tables, kernels = {"optimizer_table", "gradient_table"}, {"optimizer_advance", "optimizer_step"}
    assert seen == tables | kernels | {"gradient_norm", "clip_gradients"}


@pytest.mark.parametrize(("state", "mantissa_bits"), [(0, 6), (1, 7)])
def test_no_two_thresholds_share_a_cell(state, mantissa_bits):
    """What csrc/cuda/optimizer_state.cuh builds on: sign, exponent and some leading bits of the
    mantissa lead to at most one threshold, and none is below 2^-23 or at least 1.
    """
    thresholds = tables.state_tables(2)[state, 1, :-1]
    cells = thresholds.view(torch.int32) >> (23 - mantissa_bits)
    assert cells.unique().numel() == 255
    assert thresholds.abs().min() >= 2.0**-23 * (1 + 2.0**-mantissa_bits)
    assert thresholds.abs().max() < 1


@needs_cpu_library
@pytest.mark.parametrize("wide", [False, True], ids=["usual", "any-size"])
@pytest.mark.parametrize("cls", CLASSES, ids=_name)
def test_every_instruction_set_gives_the_same_bits(cls, wide):
    before, results = torch.ops.lowbit_cpu.isa(), []
    try:
        for level in ("generic", "avx2", "avx512"):
            try:
                torch.ops.lowbit_cpu.set_isa(level)
            except RuntimeError:
                break
            parameters = make_parameters(dtype=torch.bfloat16)
            options = {"wide": True, "grad_scale": 3.0} if wide else {}
            optimizer = _train(cls, parameters, stochastic_rounding=True, **options)
            results.append((parameters, optimizer))
    finally:
        torch.ops.lowbit_cpu.set_isa(before)
    for parameters, optimizer in results[1:]:
        _assert_same(results[0][0], parameters, results[0][1], optimizer)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.95)])
def test_200_steps_equal_torch_to_rounding(device, weight_decay, betas):
    ours, theirs = make_parameters(device=device), make_parameters(device=device)
    options = {"lr": 1e-2, "betas": betas, "weight_decay": weight_decay}
    a, b = optim.PagedAdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for step in range(200):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(a.state[p][key], b.state[q][key], rtol=1e-5, atol=1e-7)


def test_lion_by_its_definition():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = optim.PagedLion([p], lr=0.1, betas=(0.5, 0.75), weight_decay=0.5)
    p.grad = torch.tensor([2.0, -4.0, 0.0])
    optimizer.step()
    decay = torch.tensor([0.95, -1.9, 2.85])
    torch.testing.assert_close(p.detach(), decay - 0.1 * torch.tensor([1.0, -1.0, 0.0]))
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.tensor([0.5, -1.0, 0.0]))


def test_8bit_training_follows_fp32():
    """A small regression: the loss curves coincide."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator)
    y = torch.tanh(x @ torch.randn(64, 16, generator=generator) / 8)

    def losses(cls):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 16)
        )
        optimizer, curve = cls(model.parameters(), lr=3e-3), []
        for _ in range(200):
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        return curve

    exact, coded = losses(torch.optim.AdamW), losses(optim.AdamW8bit)
    assert coded[-1] < 0.02 * coded[0]
    for a, b in zip(exact, coded, strict=True):
        assert abs(a - b) < 0.05 * a + 2e-3


def test_stochastic_rounding_is_right_in_the_mean():
    """Updates far below bf16's last place: nearest rounding loses them all."""
    finals = {}
    for stochastic in (False, True):
        p = torch.nn.Parameter(torch.ones(20000, dtype=torch.bfloat16))
        optimizer = optim.PagedLion([p], lr=1e-4, stochastic_rounding=stochastic, seed=1)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        finals[stochastic] = p.detach().float().mean().item()
    assert finals[False] == 1.0
    assert finals[True] == pytest.approx(0.99, abs=3e-4)


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9000), min_size=1, max_size=8),
    coded=st.booleans(),
    slab_kib=st.integers(1, 64),
)
def test_layout_covers_every_element_once(counts, coded, slab_kib):
    layout = packing.Layout(counts, 2, coded, slab_kib << 10)
    assert [s[0] for s in layout.slabs] == [0, *(s[1] for s in layout.slabs)][:-1]
    assert layout.slabs[-1][1] == len(counts)
    for first, last, chunks, elements in layout.slabs:
        end = chunk = 0
        for row in range(first, last):
            assert layout.offsets[row] == end
            assert layout.first_chunks[row] == chunk
            end += -(-counts[row] // tables.BLOCK) * tables.BLOCK
            chunk += -(-counts[row] // packing.CHUNK)
        assert (end, chunk) == (elements, chunks)
        filled = sum(count > 0 for count in counts[first:last])
        assert filled <= 1 or elements * (2 if coded else 8) <= slab_kib << 10


@settings(max_examples=20, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 70), max_size=3), min_size=1, max_size=6),
    coded=st.booleans(),
)
def test_any_shapes_step_alike_in_one_pack_or_many(shapes, coded):
    cls = optim.PagedAdamW8bit if coded else optim.PagedAdamW
    together, apart = make_parameters(shapes), make_parameters(shapes)
    give_gradients(together, 0)
    cls(together, lr=0.1).step()
    give_gradients(apart, 0)
    gradients = [p.grad for p in apart]
    optimizer = cls(apart, lr=0.1)
    optimizer.zero_grad()
    for p, gradient in zip(apart, gradients, strict=True):
        p.grad = gradient
        optimizer.step()
        p.grad = None
    for p, q in zip(together, apart, strict=True):
        assert_bitwise_equal(p.detach(), q.detach())


# ---- torch.optim's interface ---------------------------------------------------------------------


def test_groups_have_their_own_numbers(device):
    ours, theirs = make_parameters(device=device), make_parameters(device=device)
    groups = [{"lr": 1e-2, "weight_decay": 0.0}, {"lr": 1e-3, "betas": (0.8, 0.9), "eps": 1e-4}]
    a = optim.PagedAdamW([{"params": ours[i::2], **g} for i, g in enumerate(groups)])
    b = torch.optim.AdamW([{"params": theirs[i::2], **g} for i, g in enumerate(groups)])
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_schedulers_closures_and_late_groups(device):
    ours, theirs = make_parameters(device=device), make_parameters(device=device)

    def run(optimizer_class, parameters):
        optimizer = optimizer_class(parameters[:3], lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        for step in range(6):
            if step == 2:
                optimizer.add_param_group({"params": parameters[3:], "lr": 5e-3})
                scheduler.base_lrs.append(5e-3)

            def closure(optimizer=optimizer):
                assert torch.is_grad_enabled()
                optimizer.zero_grad()
                loss = sum((p * p).sum() for p in parameters)
                loss.backward()
                return loss

            loss = optimizer.step(closure)
            scheduler.step()
        return loss

    torch.testing.assert_close(run(optim.PagedAdamW, ours), run(torch.optim.AdamW, theirs))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_training_step_is_the_same(device):
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 300, device=device))
        optimizer = optim.AdamW8bit([weight], lr=1e-2, seed=5)

        def step(weight=weight, optimizer=optimizer):
            optimizer.zero_grad()
            weight.square().sum().backward()
            optim.clip_grad_norm_([weight], 0.5)
            optimizer.step()

        run = torch.compile(step, backend="aot_eager") if compiled else step
        for _ in range(3):
            run()
        results.append(weight.detach())
    assert_bitwise_equal(*results, "weight")


def test_grad_scaler_skips_a_step_that_overflows(device):
    ours, theirs = make_parameters(device=device), make_parameters(device=device)

    def run(optimizer, parameters):
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
        for step in range(5):
            give_gradients(parameters, step)
            weights = [p.grad for p in parameters]
            optimizer.zero_grad()
            loss = sum((p * w).sum() for p, w in zip(parameters, weights, strict=True))
            scaler.scale(loss * (math.inf if step == 2 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        return scaler.get_scale()

    ours_optimizer = optim.PagedAdamW(ours, lr=1e-2)
    scale = run(ours_optimizer, ours)
    assert scale == run(torch.optim.AdamW(theirs, lr=1e-2), theirs) == 512.0
    assert ours_optimizer.state[ours[0]]["step"] == 4
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtypes", [[torch.float32], DTYPES], ids=["fp32", "mixed"])
@pytest.mark.parametrize("max_norm", [0.5, 1e6], ids=["clips", "does-not"])
def test_clipping_equals_torch(device, dtypes, max_norm):
    parameters = [p for d in dtypes for p in make_parameters(dtype=d, device=device)]
    give_gradients(parameters, 0)
    expected = [p.grad.clone().float() for p in parameters]
    norm = torch.nn.utils.get_total_norm([g.double() for g in expected])
    actual = optim.clip_grad_norm_(parameters, max_norm)
    torch.testing.assert_close(actual.double(), norm.double(), rtol=1e-6, atol=0)
    factor = min(1.0, max_norm / (norm.item() + 1e-6))
    for p, g in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad.float(), g * factor, rtol=2.0**-8, atol=1e-6)
    repeated = [optim.clip_grad_norm_(parameters, 1e9) for _ in range(3)]
    assert len({r.item() for r in repeated}) == 1


def test_clipping_refuses_a_norm_that_is_not_finite(device):
    parameters = make_parameters(device=device)
    give_gradients(parameters, 0)
    parameters[3].grad[5, 5] = math.nan
    with pytest.raises(RuntimeError, match="the norm of the gradients is nan"):
        optim.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    assert optim.clip_grad_norm_(parameters, 1.0).isnan()


# ---- 8-bit formats -------------------------------------------------------------------------------


def test_codebooks_are_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for state, signed in enumerate((True, False)):
        expected = functional.create_dynamic_map(signed=signed)
        torch.testing.assert_close(tables.state_codebook(state), expected, rtol=0, atol=6e-8)


def test_bytes_against_bitsandbytes():
    """Its CPU step is the same update with a coarse search for the nearest code: a different byte
    is a neighbour's, or stands for less than 1e-4 of the scale, and is never the nearer one.
    """
    bnb = pytest.importorskip("bitsandbytes.optim")
    ours, theirs = make_parameters([(64, 129), (4097,)]), make_parameters([(64, 129), (4097,)])
    a, b = optim.AdamW8bit(ours, lr=1e-2), bnb.AdamW8bit(theirs, lr=1e-2, min_8bit_size=0)
    exact = torch.optim.AdamW([p.detach().clone().requires_grad_() for p in ours], lr=1e-2)
    for parameters, optimizer in ((ours, a), (theirs, b), (exact.param_groups[0]["params"], exact)):
        give_gradients(parameters, 0)
        optimizer.step()
    for p, q, r in zip(ours, theirs, exact.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for state, moment in enumerate(("exp_avg", "exp_avg_sq")):
            mine, other, codebook = a.state[p], b.state[q], tables.state_codebook(state)
            scales = mine[f"absmax{state + 1}"]
            torch.testing.assert_close(scales, other[f"absmax{state + 1}"].view(-1))
            codes, expected = (o[f"state{state + 1}"].view(-1).int() for o in (mine, other))
            value = exact.state[r][moment].view(-1) / scales.repeat_interleave(256)[: r.numel()]
            far = (codes - expected).abs() > 1
            assert value[far].abs().lt(1e-4).all()
            assert (codes != expected).float().mean() < 0.05
            nearer = (codebook[expected] - value).abs() - (codebook[codes] - value).abs()
            assert nearer[codes > 1].min() > -1e-6


def test_a_small_square_never_becomes_zero():
    values = torch.full((256,), 1e-12)
    values[0] = 1.0
    codes, scales = tables.quantize_state(values, 1)
    assert codes[1:].eq(1).all()
    assert tables.dequantize_state(codes, scales, 1)[1] > 0
    assert tables.quantize_state(torch.zeros(256), 1)[0].eq(tables.zero_code(1)).all()


def test_random_rounding_keeps_special_values(device):
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, 1.0, -0.0])
    out = reference.round_randomly(x, seed=3, step=1, position=0)
    torch.testing.assert_close(out.float(), x, rtol=0, atol=0, equal_nan=True)
    special = x[:3].repeat(100).bfloat16().to(device)
    for cls in CLASSES:
        p = torch.nn.Parameter(special.clone())
        p.grad = torch.randn(300, device=device).bfloat16()
        cls([p], stochastic_rounding=True).step()
        torch.testing.assert_close(p.detach(), special, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", [optim.AdamW8bit, optim.PagedAdamW])
def test_shards_are_refused(kind, process_group):
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Linear(8, 8)
    early = kind(model.parameters())
    fully_shard(model)
    with pytest.raises(TypeError, match=r"weight .* must be an ordinary tensor, got a DTensor"):
        kind(model.named_parameters())
    model(torch.ones(2, 8)).sum().backward()
    with pytest.raises(TypeError, match="clip_grad_norm_ needs ordinary tensors, got a DTensor"):
        optim.clip_grad_norm_(model.parameters(), 1.0)
    early.param_groups[0]["params"] = list(model.parameters())  # as accelerate does
    with pytest.raises(TypeError, match="parameter 0 of group 0 must be an ordinary tensor"):
        early.step()


@pytest.mark.parametrize("stepped", [False, True])
def test_parameters_that_were_exchanged_are_refused(stepped):
    """They have no state; a step would leave them as they are."""
    old, new = (torch.nn.Parameter(torch.ones(8)) for _ in range(2))
    optimizer = optim.AdamW8bit([old])
    optimizer.step()  # nothing has a gradient
    if stepped:
        old.grad = torch.ones(8)
        optimizer.step()
        old.grad = None
    new.grad = torch.ones(8)
    optimizer.param_groups[0]["params"] = [new]
    with pytest.raises(ValueError, match="parameter 0 of group 0 was put into the group after"):
        optimizer.step()


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("stepped", [False, True])
def test_parameters_put_into_a_list_by_hand_are_refused(device, named, stepped):
    """Those beside them have state and would be stepped."""
    old, new = (torch.nn.Parameter(torch.ones(8, device=device)) for _ in range(2))
    optimizer = optim.AdamW8bit([("old", old)] if named else [old])
    for parameter in (old, new):
        parameter.grad = torch.ones_like(parameter)
    if stepped:
        optimizer.step()
    before = old.detach().clone()
    optimizer.param_groups[0]["params"].append(new)
    with pytest.raises(ValueError, match=r"^parameter 1 of group 0 was put into the group after"):
        optimizer.step()
    assert_bitwise_equal(old.detach(), before)
    optimizer.param_groups[0]["params"].pop()
    optimizer.add_param_group({"params": [("new", new)] if named else [new]})
    optimizer.step()
    assert not torch.equal(new.detach(), torch.ones_like(new))


def _pop_parameter(groups):
    groups[0]["params"].pop()


def _pop_group(groups):
    groups.pop()


def _move(groups):
    groups[1]["params"].insert(0, groups[0]["params"].pop())


@pytest.mark.parametrize("change", [_pop_parameter, _pop_group, _move])
def test_parameters_taken_out_by_hand_are_refused(device, change):
    """They would be stepped all the same, by the numbers of the group they came from."""
    a, b, c = parameters = [torch.nn.Parameter(torch.ones(8, device=device)) for _ in range(3)]
    optimizer = optim.PagedAdamW([{"params": [a, b]}, {"params": [c], "lr": 1.0}])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = [p.detach().clone() for p in parameters]
    change(optimizer.param_groups)
    with pytest.raises(ValueError, match="were taken out of the groups or moved in them"):
        optimizer.step()
    for p, old in zip(parameters, before, strict=True):
        assert_bitwise_equal(p.detach(), old)


def test_a_loaded_state_dict_settles_what_was_changed_by_hand(device):
    """Loading makes the state anew for the groups as they are."""
    old, new = (torch.nn.Parameter(torch.ones(8, device=device)) for _ in range(2))
    optimizer, other = optim.AdamW8bit([old]), optim.AdamW8bit([old, new])
    for parameter in (old, new):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    other.step()
    optimizer.param_groups[0]["params"].append(new)
    optimizer.load_state_dict(other.state_dict())
    before = new.detach().clone()
    optimizer.step()
    assert not torch.equal(new.detach(), before)


@pytest.mark.parametrize("kind", CLASSES)
def test_processes_round_alike(kind, process_group, monkeypatch):
    """Copies of a parameter that DDP does not synchronize again must not drift apart."""
    parameter = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    kind([parameter], stochastic_rounding=True)  # alone in its group
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    kind([parameter])
    kind([parameter], stochastic_rounding=True, seed=3)
    with pytest.raises(ValueError, match="seed must be given, the same on all ranks"):
        kind([parameter], stochastic_rounding=True)
