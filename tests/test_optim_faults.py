"""What lowbit.optim refuses, skips or passes on: bad input never changes parameters or state."""

import math

import pytest
import torch
from helpers import assert_bitwise_equal
from optimizer_cases import CLASSES, give_gradients, make_parameters

import lowbit
import lowbit.optim as optim


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_gradients_go_through_as_in_torch(device, value):
    ours, theirs = make_parameters(device=device), make_parameters(device=device)
    a, b = optim.PagedAdamW(ours), torch.optim.AdamW(theirs)
    for parameters in (ours, theirs):
        give_gradients(parameters, 0)
        parameters[0].grad[3, 3] = value
    a.step()
    b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_skip_nonfinite_changes_nothing(cls, device):
    parameters = make_parameters(device=device)
    optimizer = cls(parameters, lr=1e-2, skip_nonfinite=True)
    give_gradients(parameters, 0)
    optimizer.step()
    before = [p.detach().clone() for p in parameters]
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters]
    parameters[4].grad[4999] = math.inf
    optimizer.step()
    for p, old, entry in zip(parameters, before, state, strict=True):
        assert_bitwise_equal(p.detach(), old)
        for key, value in optimizer.state[p].items():
            assert_bitwise_equal(value, entry[key], key)
    parameters[4].grad[4999] = 0.0
    optimizer.step()
    assert not torch.equal(parameters[0].detach(), before[0])


def _sparse(p):
    p.grad = torch.ones_like(p).to_sparse()


def _short_parameter(p):
    p.data = p.data[:10].clone()
    p.grad = torch.ones_like(p)


def _half_parameter(p):
    p.grad = None
    p.data = p.data.half()
    p.grad = torch.ones_like(p)


def _freed_parameter(p):
    p.untyped_storage().resize_(0)


def _freed_view(p):
    p.data = torch.ones(2 * p.numel(), device=p.device)[p.numel() :]
    p.untyped_storage().resize_(0)


def _freed_gradient(p):
    p.grad.untyped_storage().resize_(0)


def _other_shape(p):
    p.data = p.data.view(16, 16)


def _other_dtype(p):
    p.grad_dtype = None
    p.grad = torch.ones(p.shape, dtype=torch.float16, device=p.device)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_sparse, r"the gradient of b \(parameter 1 of group 0\) is sparse"),
        (_short_parameter, r"b \(parameter 1 of group 0\) had 256 elements .* and has 10 now"),
        (_half_parameter, r"b \(parameter 1 of group 0\) was float32 on .* and is float16"),
        (_freed_parameter, r"the memory of b \(parameter 1 of group 0\) was freed"),
        (_freed_view, r"the memory of b \(parameter 1 of group 0\) was freed"),
        (_freed_gradient, r"the memory of the gradient of b \(parameter 1 of group 0\) was freed"),
        (
            _other_shape,
            r"the gradient of b .* must have the parameter's shape \[16, 16\], got \[256\]",
        ),
    ],
    ids=["sparse", "shortened", "converted", "freed", "view", "gradient-freed", "other-shape"],
)
def test_a_refused_step_changes_nothing(device, spoil, message):
    parameters = make_parameters(device=device)
    optimizer = optim.PagedAdamW(list(zip("abcdefg", parameters, strict=True)))
    give_gradients(parameters, 0)
    optimizer.step()
    give_gradients(parameters, 1)
    spoil(parameters[1])
    others = [p for p in parameters if p is not parameters[1]]
    before = [p.detach().clone() for p in others]
    state = {k: v.clone() for k, v in optimizer.state[parameters[3]].items()}
    new = torch.nn.Parameter(torch.ones(3, device=device))
    new.grad = torch.ones_like(new)
    optimizer.add_param_group({"params": [("new", new)]})
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert new not in optimizer.state
    for p, old in zip(others, before, strict=True):
        assert_bitwise_equal(p.detach(), old)
    for key, value in optimizer.state[parameters[3]].items():
        assert_bitwise_equal(value, state[key], key)


def test_a_refused_first_step_makes_no_state(device):
    parameters = make_parameters(device=device)
    optimizer = optim.PagedAdamW(parameters)
    give_gradients(parameters, 0)
    _sparse(parameters[1])
    with pytest.raises(RuntimeError, match=r"the gradient of parameter 1 of group 0 is sparse"):
        optimizer.step()
    assert not optimizer.state
    assert optimizer.state_bytes() == {"device": 0, "host": 0}


@pytest.mark.skipif(
    not hasattr(torch.nn.Parameter(torch.zeros(1)), "grad_dtype"),
    reason="this torch refuses a gradient of another dtype itself",
)
def test_a_gradient_of_another_dtype_is_refused():
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = optim.PagedAdamW([p])
    _other_dtype(p)
    with pytest.raises(RuntimeError, match="must have the parameter's dtype float32, got float16"):
        optimizer.step()


def test_clipping_refuses_a_gradient_without_memory(device):
    parameters = make_parameters(device=device)
    give_gradients(parameters, 0)
    _freed_gradient(parameters[1])
    with pytest.raises(RuntimeError, match="the memory of a gradient was freed"):
        optim.clip_grad_norm_(parameters, 1.0)


def test_gradients_with_strides(device):
    """A transposed and an expanded gradient are read as the values they hold."""
    for gradient in (torch.randn(7, 300).t(), torch.randn(1, 7).expand(300, 7)):
        ours, theirs = (make_parameters([(300, 7)], device=device) for _ in range(2))
        ours[0].grad, theirs[0].grad = gradient.to(device), gradient.to(device).contiguous()
        optim.PagedAdamW(ours).step()
        optim.PagedAdamW(theirs).step()
        assert_bitwise_equal(ours[0].detach(), theirs[0].detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_clipping_gradients_with_strides(dtype, device):
    """The factor is fp32 there, too: rounded to bf16 it would leave a norm above the largest."""
    gradient = torch.randn(64, 48, device=device, dtype=dtype).mul(3)
    ours, theirs = (make_parameters([(48, 64)], dtype=dtype, device=device) for _ in range(2))
    ours[0].grad, theirs[0].grad = gradient.t(), gradient.t().contiguous()
    optim.clip_grad_norm_(ours, 1.0)
    optim.clip_grad_norm_(theirs, 1.0)
    assert_bitwise_equal(ours[0].grad, theirs[0].grad)


def test_unaligned_views(device):
    """Parameters and gradients that start anywhere take the elementwise path of the kernels."""
    base_p, base_g = torch.randn(1001, device=device), torch.randn(1001, device=device)
    p, q = torch.nn.Parameter(base_p[1:]), torch.nn.Parameter(base_p[1:].clone())
    p.grad, q.grad = base_g[1:], base_g[1:].clone()
    optim.AdamW8bit([p]).step()
    optim.AdamW8bit([q]).step()
    assert_bitwise_equal(p.detach(), q.detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"lr": math.nan}, "lr must be at least 0, got nan"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        ({"eps": -1e-8}, "eps must be at least 0"),
        ({"weight_decay": -1}, "weight_decay must be at least 0"),
        ({"amsgrad": True}, "amsgrad is not offered"),
        ({"seed": 1.5}, "seed must be an integer of 64 bits, got 1.5"),
        ({"seed": 2**63}, "seed must be an integer of 64 bits, got 9223372036854775808"),
        ({"paging": "disk"}, "paging must be one of auto, managed, pinned, got 'disk'"),
        ({"policy": "fast"}, "policy must be one of auto, resident, prefetch, zero_copy"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        optim.PagedAdamW([torch.nn.Parameter(torch.zeros(3))], **options)


@pytest.mark.parametrize(
    "option", [{"lr": "0.1"}, {"betas": 0.9}, {"betas": (0.9, "0")}, {"eps": None}]
)
def test_options_that_are_no_numbers_are_named(option):
    for build in (optim.PagedAdamW, optim.PagedLion)[: 1 if "eps" in option else 2]:
        with pytest.raises(TypeError, match="lr, eps and weight_decay must be numbers and betas"):
            build([torch.nn.Parameter(torch.zeros(3))], **option)


@pytest.mark.parametrize("option", [{"paging": "pinned"}, {"policy": "prefetch"}])
def test_state_that_does_not_page_takes_no_options_of_paging(option):
    with pytest.raises(ValueError, match="AdamW8bit's stays on the device"):
        optim.AdamW8bit([torch.nn.Parameter(torch.zeros(3))], **option)


def test_bad_parameters():
    with pytest.raises(TypeError, match=r"parameter 0 of group 0 must be float32.*got float64"):
        optim.PagedAdamW([torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))])
    with pytest.raises(ValueError, match="parameter 0 of group 0 must be contiguous"):
        optim.PagedAdamW([torch.nn.Parameter(torch.zeros(3, 4).t())])
    with pytest.raises(ValueError, match="empty parameter list"):
        optim.PagedAdamW([])


def test_groups_and_steps_without_anything_to_do():
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = optim.PagedAdamW([{"params": [p]}, {"params": []}])
    optimizer.step()
    assert optimizer.state_bytes() == {"device": 0, "host": 0}
    assert optim.clip_grad_norm_([p], 1.0) == 0


def test_all_parameters_of_a_prepared_model_are_accepted():
    """As by torch.optim: packed weights are frozen, whatever their dtype."""
    layer = lowbit.nn.QLoRALinear(64, 64, bias=False, r=2)
    optimizer = optim.AdamW8bit(layer.parameters())
    layer(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    assert set(optimizer.state) == {layer.lora_A, layer.lora_B}


def test_frozen_parameters_cost_nothing():
    trained, frozen = (torch.nn.Parameter(torch.zeros(300)) for _ in range(2))
    optimizer = optim.PagedAdamW([frozen, trained])
    trained.grad = torch.ones(300)
    optimizer.step()
    assert list(optimizer.state) == [trained]
    assert optimizer.state_bytes()["device"] == 2 * 4 * 512


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_default_device_and_dtype_do_not_matter(cls, device):
    """Programs set them for what they make themselves."""

    def train(default_device, default_dtype):
        parameters = make_parameters(device=device)
        for step in range(3):
            give_gradients(parameters, step)
            if step == 0:
                optimizer = cls(parameters, lr=1e-2, seed=3, skip_nonfinite=True)
                parameters[1].grad = None
            torch.set_default_device(default_device)
            torch.set_default_dtype(default_dtype)
            try:
                optim.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.load_state_dict(optimizer.state_dict())
            finally:
                torch.set_default_device(None)
                torch.set_default_dtype(torch.float32)
        return [t for p in parameters for t in (p.detach(), *optimizer.state[p].values())]

    expected = train(None, torch.float32)
    for actual, right in zip(train("meta", torch.bfloat16), expected, strict=True):
        assert_bitwise_equal(actual, right)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_autograd_notices_what_changed(cls, device):
    """A step and clipping are changes in place like any other."""
    weight = torch.nn.Parameter(torch.randn(4, 4, device=device))
    x = torch.randn(3, 4, device=device, requires_grad=True)
    gradient = weight.grad = torch.ones_like(weight)
    optimizer = cls([weight], lr=1e-2)
    y = x @ weight
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    version = gradient._version
    optim.clip_grad_norm_([weight], 1.0)
    assert gradient._version > version
