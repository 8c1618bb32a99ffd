"""State dicts of lowbit.optim: exact round trips, resuming, torch.optim and bitsandbytes."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from helpers import assert_bitwise_equal
from optimizer_cases import CLASSES, give_gradients, make_parameters

import lowbit.optim as optim

SHAPES = [(300, 7), (256,), (4096, 3), (257,)]


def _parameters(dtype=torch.float32, device="cpu"):
    return make_parameters(SHAPES, dtype, device)


def _steps(optimizer, parameters, steps):
    for step in steps:
        give_gradients(parameters, step)
        optimizer.step()


def _saved(state_dict):
    """Through torch.save and a load that allows nothing but tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, map_location="cpu", weights_only=True)


def _assert_same_state(a, b, optimizer_a, optimizer_b):
    for p, q in zip(a, b, strict=True):
        assert optimizer_a.state[p].keys() == optimizer_b.state[q].keys()
        for key, value in optimizer_a.state[p].items():
            assert_bitwise_equal(value.cpu(), optimizer_b.state[q][key].cpu(), key)


# ---- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_resuming_reproduces_the_run_bit_for_bit(cls, dtype, device):
    """Also the random rounding, whose seed the state dict carries."""
    through = _parameters(dtype, device)
    optimizer = cls(through, lr=1e-2, stochastic_rounding=True)
    _steps(optimizer, through, range(3))
    checkpoint = _saved({"model": [p.detach() for p in through], "optim": optimizer.state_dict()})
    _steps(optimizer, through, range(3, 6))

    resumed = [torch.nn.Parameter(p.to(device)) for p in checkpoint["model"]]
    again = cls(resumed, lr=0.5, stochastic_rounding=True)
    again.load_state_dict(checkpoint["optim"])
    assert again.param_groups[0]["lr"] == 1e-2
    _steps(again, resumed, range(3, 6))
    for p, q in zip(through, resumed, strict=True):
        assert_bitwise_equal(q.detach(), p.detach())
    _assert_same_state(through, resumed, optimizer, again)


@pytest.mark.parametrize("cls", [optim.AdamW8bit, optim.PagedLion8bit], ids=lambda c: c.__name__)
def test_loaded_scales_leave_the_padding_of_a_block_at_zero(cls, device):
    """100 of 256 elements, shrinking momentum: the rest of the block must not hold the scale."""
    scales = []
    for resumes in (False, True):
        parameter = torch.nn.Parameter(torch.ones(100, device=device))
        optimizer = cls([parameter], lr=1e-3)
        for step in range(8):
            parameter.grad = torch.full_like(parameter, 1.0 if step < 4 else -1.0)
            optimizer.step()
            if resumes and step == 3:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = cls([parameter], lr=1e-3)
                optimizer.load_state_dict(state)
        scales.append(optimizer.state[parameter]["absmax1"].item())
    assert scales[0] == scales[1]


@pytest.mark.parametrize("saved", [{}, {"state": {}}, {"model": 1}], ids=str)
def test_what_is_no_state_dict_of_an_optimizer_is_refused(saved):
    optimizer = optim.AdamW8bit(_parameters())
    with pytest.raises(ValueError, match=r"no optimizer's: it has no .*param_groups"):
        optimizer.load_state_dict(saved)


_ENDLESS_RUN = """
import sys, torch, lowbit.optim as optim
parameter = torch.nn.Parameter(torch.ones(300_000, dtype=torch.bfloat16))
optimizer = optim.PagedAdamW8bit([parameter], lr=1e-2, stochastic_rounding=True, seed=3)
step = 0
while True:
    parameter.grad = torch.full_like(parameter, 1.0 / (step + 1))
    optimizer.step()
    step += 1
    if step == 3:
        saved = {"model": parameter.detach(), "optim": optimizer.state_dict(), "step": step}
        torch.save(saved, sys.argv[1])
        print("saved", flush=True)
"""


def test_a_killed_run_resumes_from_its_checkpoint_bit_for_bit(tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    command = [sys.executable, "-c", _ENDLESS_RUN, str(checkpoint)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "saved\n"
        run.kill()  # in the middle of some later step

    def train(parameter, optimizer, steps):
        for step in steps:
            parameter.grad = torch.full_like(parameter, 1.0 / (step + 1))
            optimizer.step()

    options = {"lr": 1e-2, "stochastic_rounding": True, "seed": 3}
    through = torch.nn.Parameter(torch.ones(300_000, dtype=torch.bfloat16))
    train(through, optim.PagedAdamW8bit([through], **options), range(6))
    saved = torch.load(checkpoint, weights_only=True)
    resumed = torch.nn.Parameter(saved["model"])
    optimizer = optim.PagedAdamW8bit([resumed], stochastic_rounding=True)
    optimizer.load_state_dict(saved["optim"])
    train(resumed, optimizer, range(saved["step"], 6))
    assert_bitwise_equal(resumed.detach(), through.detach())


@pytest.mark.gpu
@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_state_moves_between_devices(cls):
    on_gpu, on_cpu = _parameters(device="cuda"), _parameters()
    a, b = cls(on_gpu, lr=1e-2), cls(on_cpu, lr=1e-2)
    _steps(a, on_gpu, range(3))
    b.load_state_dict(a.state_dict())
    _assert_same_state(on_gpu, on_cpu, a, b)
    c = cls(on_gpu, lr=1e-2)
    c.load_state_dict(_saved(b.state_dict()))
    _assert_same_state(on_gpu, on_gpu, a, c)
    if cls.paged:
        c.evict()
        assert c.state_bytes()["device"] == 0
        _assert_same_state(on_gpu, on_gpu, a, c)


@pytest.mark.gpu
@pytest.mark.parametrize("cls", [optim.PagedAdamW, optim.PagedAdamW8bit], ids=lambda c: c.__name__)
def test_state_of_two_devices_resumes_on_one(cls):
    on_one = _parameters()
    on_two = [
        torch.nn.Parameter(p.detach().to("cuda" if i % 2 else "cpu")) for i, p in enumerate(on_one)
    ]
    a, b = cls(on_two, lr=1e-2), cls(on_one, lr=1e-2)
    _steps(a, on_two, range(3))
    b.load_state_dict(_saved(a.state_dict()))
    for p, q in zip(on_one, on_two, strict=True):
        p.data.copy_(q.data)
    again = cls(on_two, lr=1e-2)
    again.load_state_dict(_saved(b.state_dict()))
    for optimizer, parameters in ((again, on_two), (b, on_one)):
        _steps(optimizer, parameters, range(3, 5))
    _assert_same_state(on_one, on_two, b, again)
    for p, q in zip(on_one, on_two, strict=True):
        assert_bitwise_equal(p.detach(), q.detach().cpu())


def test_loading_into_live_state_and_other_sets_of_parameters():
    a, b = _parameters(), _parameters()
    source, target = optim.PagedAdamW8bit(a), optim.PagedAdamW8bit(b)
    _steps(source, a, range(2))
    _steps(target, b, range(5))
    target.load_state_dict(source.state_dict())
    _assert_same_state(a, b, source, target)
    partial = copy.deepcopy(source.state_dict())
    del partial["state"][2]
    target.load_state_dict(partial)
    assert b[2] not in target.state
    assert target.state[b[0]]["step"] == 2
    _steps(target, b, range(1))
    assert target.state[b[2]]["step"] == 1


def test_hooks_see_the_state_dict():
    parameters = _parameters()
    optimizer, seen = optim.PagedAdamW(parameters), []
    optimizer.register_load_state_dict_pre_hook(lambda _, d: seen.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("post"))
    optimizer.load_state_dict(optim.PagedAdamW(_parameters()).state_dict())
    assert seen == ["pre", "post"]


def test_copying_an_optimizer_is_refused():
    optimizer = optim.PagedAdamW(_parameters())
    with pytest.raises(TypeError, match="save its state_dict"):
        copy.deepcopy(optimizer)


# ---- torch.optim ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_to_torch_and_back(fused, device):
    ours, theirs = _parameters(device=device), _parameters(device=device)
    a = optim.PagedAdamW(ours, lr=1e-2, weight_decay=0.1)
    _steps(a, ours, range(3))
    b = torch.optim.AdamW(theirs, fused=fused)
    b.load_state_dict(_saved(a.state_dict()))
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data)
    _steps(a, ours, range(3, 6))
    _steps(b, theirs, range(3, 6))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    c = optim.PagedAdamW(ours)
    c.load_state_dict(_saved(b.state_dict()))
    assert c.param_groups[0]["weight_decay"] == 0.1
    assert "fused" not in c.param_groups[0]
    for p, q in zip(ours, theirs, strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert_bitwise_equal(c.state[p][key].cpu(), b.state[q][key].cpu(), key)


def test_a_cycle_of_learning_rates_goes_on():
    """What the scheduler keeps in the groups is loaded, too."""

    def rates(optimizer, steps, last=-1):
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10, last_epoch=last)
        for _ in range(steps):
            yield optimizer.param_groups[0]["lr"]
            optimizer.step()
            scheduler.step()

    whole, first, second = (optim.PagedAdamW(_parameters()) for _ in range(3))
    begun = list(rates(first, 4))
    second.load_state_dict(_saved(first.state_dict()))
    assert begun + list(rates(second, 5, last=3)) == list(rates(whole, 9))


def test_8bit_state_for_torch():
    ours, theirs = _parameters(), _parameters()
    a, b = optim.AdamW8bit(ours, lr=1e-2), torch.optim.AdamW(theirs)
    _steps(a, ours, range(3))
    b.load_state_dict(_saved(a.torch_state_dict()))
    exact = optim.PagedAdamW(_parameters())
    exact.load_state_dict(a.state_dict())
    for p, q in zip(exact.param_groups[0]["params"], theirs, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert_bitwise_equal(b.state[q][key], exact.state[p][key], key)
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data)
    _steps(b, theirs, range(3, 4))


def test_fp32_state_of_bf16_parameters_stays_fp32():
    """torch.optim rounds it to the parameters' dtype on loading; lowbit does not."""
    parameters = _parameters(torch.bfloat16)
    a = optim.PagedAdamW(parameters)
    _steps(a, parameters, range(2))
    b = optim.PagedAdamW(parameters)
    b.load_state_dict(a.state_dict())
    assert b.state[parameters[0]]["exp_avg"].dtype == torch.float32
    _assert_same_state(parameters, parameters, a, b)


# ---- bitsandbytes --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("rule", ["AdamW", "Lion"])
def test_reads_what_bitsandbytes_writes(rule, bits):
    bnb = pytest.importorskip("bitsandbytes.optim")
    theirs, ours = _parameters(), _parameters()
    kwargs = {"lr": 1e-2, "weight_decay": 0.1, "optim_bits": bits}
    if bits == 8:
        kwargs["min_8bit_size"] = 0
    source = getattr(bnb, rule)(theirs, **kwargs)
    _steps(source, theirs, range(2))
    target = getattr(optim, f"Paged{rule}" + ("8bit" if bits == 8 else ""))(ours)
    target.load_state_dict(_saved(source.state_dict()))
    assert target.param_groups[0]["weight_decay"] == 0.1
    for p, q in zip(theirs, ours, strict=True):
        saved, loaded = source.state[p], target.state[q]
        assert loaded["step"] == saved["step"]
        moments = {"AdamW": ("exp_avg", "exp_avg_sq"), "Lion": ("exp_avg",)}[rule]
        for i, moment in enumerate(moments, start=1):
            if bits == 32:
                assert_bitwise_equal(loaded[moment], saved[f"state{i}"], moment)
            else:
                assert_bitwise_equal(loaded[f"state{i}"], saved[f"state{i}"], f"state{i}")
                expected = saved[f"absmax{i}"].view(-1)
                assert_bitwise_equal(loaded[f"absmax{i}"], expected, f"absmax{i}")
        q.data.copy_(p.data)
    _steps(source, theirs, range(2, 3))
    _steps(target, ours, range(2, 3))
    for p, q in zip(theirs, ours, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_bitsandbytes_reads_what_is_written():
    bnb = pytest.importorskip("bitsandbytes.optim")
    ours, theirs = _parameters(), _parameters()
    a = optim.AdamW8bit(ours, lr=1e-2)
    _steps(a, ours, range(2))
    b = bnb.AdamW8bit(theirs, min_8bit_size=0)
    b.load_state_dict(_saved(a.state_dict()))
    for p, q in zip(ours, theirs, strict=True):
        assert_bitwise_equal(b.state[q]["state1"], a.state[p]["state1"], "state1")


def test_8bit_and_fp32_state_convert():
    ours = _parameters()
    coded, exact = optim.AdamW8bit(ours), optim.PagedAdamW(ours)
    _steps(exact, ours, range(2))
    coded.load_state_dict(exact.state_dict())
    back = optim.PagedAdamW(ours)
    back.load_state_dict(coded.state_dict())
    for p in ours:
        for key in ("exp_avg", "exp_avg_sq"):
            a, b = exact.state[p][key], back.state[p][key]
            assert (a - b).abs().max() <= 0.01 * a.abs().max()


# ---- refusals ------------------------------------------------------------------------------------


def _other_map(state):
    state["state"][1]["qmap1"] = torch.linspace(-1, 1, 256)


def _short_scales(state):
    state["state"][1]["absmax1"] = torch.zeros(3)


def _other_shape(state):
    state["state"][1]["state1"] = torch.zeros(9, dtype=torch.uint8)


def _fewer(state):
    state["param_groups"][0]["params"].pop()


def _amsgrad(state):
    state["param_groups"][0]["amsgrad"] = True


def _one_moment(state):
    del state["state"][1]["state2"]


def _no_scales(state):
    del state["state"][1]["absmax1"]


def _float_codes(state):
    state["state"][1]["state1"] = state["state"][1]["state1"].float()


def _listed(state):
    state["state"][1]["state2"] = [0] * 256


def _short_map(state):
    state["state"][1]["qmap1"] = torch.zeros(255)


def _no_step(state):
    del state["state"][1]["step"]


def _nan_step(state):
    state["state"][1]["step"] = torch.tensor(float("nan"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_other_map, "parameter 1 of group 0 uses an 8-bit map that is not bitsandbytes' dynamic"),
        (_short_scales, "parameter 1 of group 0 has 3 scales, blocks of 256 elements make it 1"),
        (_other_shape, "parameter 1 of group 0 has 9 elements, the parameter 256"),
        (_fewer, r"groups of \[3\] parameters, the optimizer of \[4\]"),
        (_amsgrad, "amsgrad, which is not offered"),
        (_one_moment, "parameter 1 of group 0 has 1 moments"),
        (_listed, "parameter 1 of group 0 has no tensor for moment 2"),
        (_no_scales, r"parameter 1 of group 0 is damaged: state1 is torch\.uint8 without absmax1"),
        (_float_codes, "parameter 1 of group 0 is damaged: state1 is .* with absmax1"),
        (_short_map, "parameter 1 of group 0 uses an 8-bit map that is not bitsandbytes' dynamic"),
        (_no_step, "parameter 1 of group 0 has step None, which is no number of steps"),
        (_nan_step, "parameter 1 of group 0 has step nan, which is no number of steps"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(spoil, message):
    parameters = _parameters()
    optimizer = optim.AdamW8bit(parameters, lr=1e-2)
    _steps(optimizer, parameters, range(2))
    before = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters]
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = 5.0
    spoil(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 1e-2
    for p, entry in zip(parameters, before, strict=True):
        for key, value in optimizer.state[p].items():
            assert_bitwise_equal(value, entry[key], key)
