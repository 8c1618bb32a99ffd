"""Fused layers and models on a device that is not current, and models on two devices."""

import pytest
import torch
from helpers import assert_bitwise_equal
from test_capture import VOCABULARY, eager_step, mean_loss, tiny, trained
from test_cuda_devices import _operands

import lowbit
from lowbit.capture import CapturedBackward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
FIRST, SECOND = "cuda:0", "cuda:1"


def _model(device, **options):
    """The same parameters on any device. Plain attention: its gradients are deterministic."""
    model = tiny("cpu", **options).to(device)
    model.config._attn_implementation = "eager"
    return model


def _ids(device, *, seed=0, shape=(2, 80)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, shape, generator=generator).to(device)


# ---- one device, which is not current


def _group(operands, device):
    """(ys, gradients of x, lora_As, lora_Bs) of three layers that read one x."""
    W, x, A, B, dy = (t.to(device) for t in operands.values())
    q = lowbit.quantize(W)
    As, Bs = ([t * s for s in (1.0, -0.5, 2.0)] for t in (A, B))
    leaves = [t.requires_grad_() for t in (x, *As, *Bs)]
    for _ in range(3):
        ys = lowbit.lora_matmul_group(x, [q] * 3, As, Bs, 0.5)
        gradients = torch.autograd.grad(ys, leaves, [dy] * 3)
    return *ys, *gradients


def _mlp(operands, device):
    """(y, gradients of x, lora_As, lora_Bs) of a gated MLP: K to 512, and 512 to K."""
    W, x, A, B, _ = (t.to(device) for t in operands.values())
    W, B = W[:512].contiguous(), B[:512].contiguous()
    up, down = lowbit.quantize(W), lowbit.quantize(W.t().contiguous())
    As = [A, A.flip(0), B.t().contiguous()]
    Bs = [B, B.flip(0), A.t().contiguous()]
    leaves = [t.clone().requires_grad_() for t in (x, *As, *Bs)]
    x, As, Bs = leaves[0], leaves[1:4], leaves[4:]
    for _ in range(3):
        y = lowbit.lora_gated_mlp(x, [up, up, down], As, Bs, 0.5)
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
    return y, *gradients


@pytest.mark.parametrize("M", [8, 100, 1100])  # with products of their own, and shared ones
@pytest.mark.parametrize("fused", [_group, _mlp])
def test_fused_layers_on_a_device_that_is_not_current(fused, M):
    operands = _operands(M)
    with torch.cuda.device(0):
        results, expected = fused(operands, "cuda:1"), fused(operands, "cuda:0")
    for i, (result, other) in enumerate(zip(results, expected, strict=True)):
        assert result.device == torch.device("cuda:1")
        assert_bitwise_equal(result, other, f"result {i}")


def test_graphs_are_recorded_on_the_device_of_the_parameters():
    """Recorded on the current one they would be empty, and a replay would add no gradients."""
    with torch.cuda.device(0):
        model = tiny(SECOND)
        parameters = trained(model)
        captured = CapturedBackward(mean_loss(model), parameters)
        for step in range(5):
            ids = _ids(SECOND, seed=step)
            captured.zero()
            loss = captured(ids).item()
            static = [p.grad for p in parameters]
            for p in parameters:
                p.grad = None
            assert loss == pytest.approx(eager_step(model, ids), rel=1e-5)
            for p, mine in zip(parameters, static, strict=True):
                assert (mine - p.grad).norm() <= 1e-4 * p.grad.norm()
                p.grad = mine  # the graphs write where it was when they were recorded
        assert torch.cuda.current_device() == 0
    assert (captured.failure, captured.shapes) == (None, 1)


# ---- two devices


def _moved(value, device):
    """A value with all tensors in it on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(v, device) for v in value)
    return {k: _moved(v, device) for k, v in value.items()} if isinstance(value, dict) else value


def _split_by_hooks(model):
    """The second layer and the last norm on the second device. Linear layers have no hooks: what
    is fused stays fused.
    """
    second = (model.model.layers[1], model.model.norm)
    for module in second:
        module.to(SECOND)
        module.register_forward_pre_hook(
            lambda module, args, kwargs: (_moved(args, SECOND), _moved(kwargs, SECOND)),
            with_kwargs=True,
        )
    second[-1].register_forward_hook(lambda module, args, y: y.to(FIRST))
    return model


def _split_by_accelerate(model):
    """The same by a device map, whose hooks are on every linear layer."""
    accelerate = pytest.importorskip("accelerate")
    places = {
        "model.embed_tokens": FIRST, "model.layers.0": FIRST, "model.layers.1": SECOND,
        "model.norm": SECOND, "model.rotary_emb": FIRST, "lm_head": FIRST,
    }  # fmt: skip
    return accelerate.dispatch_model(model, device_map=places, main_device=FIRST)


def _step(model, ids) -> float:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item()


def _train(model, steps=3):
    """Losses of some steps, the last gradients and the parameters."""
    optimizer = lowbit.optim.PagedAdamW8bit(trained(model), lr=1e-2, skip_nonfinite=True)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        losses.append(_step(model, _ids(FIRST, seed=step)))
        optimizer.step()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = dict(zip(names, trained(model), strict=True))
    return losses, {name: p.grad for name, p in parameters.items()}, parameters


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("split", [_split_by_hooks, _split_by_accelerate])
def test_a_model_on_two_devices_computes_what_it_does_on_one(split, checkpointing):
    """Bit for bit: losses, gradients, and parameters after steps of a paged optimizer."""
    options = {"fuse": split is _split_by_hooks, "checkpointing": checkpointing}
    expected, grads, parameters = _train(_model(FIRST, **options))
    model = split(_model("cpu" if split is _split_by_accelerate else FIRST, **options))
    layers = model.model.layers
    assert layers[0].mlp.up_proj.weight.device == torch.device(FIRST)
    assert {t.device for t in layers[1].state_dict().values()} == {torch.device(SECOND)}
    losses, results, moved = _train(model)
    assert losses == expected
    for name, grad in grads.items():
        assert results[name].device == moved[name].device
        assert_bitwise_equal(results[name], grad, f"gradient of {name}")
        assert_bitwise_equal(moved[name], parameters[name], name)


def test_the_norm_of_gradients_on_two_devices():
    """Each device's norm is rounded to fp32 before they are put together."""
    gradients = [torch.randn(300, 70), torch.randn(1000)]
    parameters = []
    for gradient, device in zip(gradients, (FIRST, SECOND), strict=True):
        parameters.append(torch.nn.Parameter(torch.zeros_like(gradient, device=device)))
        parameters[-1].grad = gradient.to(device, copy=True)
    norm = lowbit.optim.clip_grad_norm_(parameters, 1.0)
    expected = torch.cat([g.double().flatten() for g in gradients]).norm()
    assert norm.device == torch.device(FIRST)
    assert norm.item() == pytest.approx(expected.item(), rel=4 * 2.0**-24)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        scaled = gradient.double() / (expected + 1e-6)
        torch.testing.assert_close(parameter.grad.cpu().double(), scaled, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("part", ["k_proj", "down_proj"])
def test_a_fused_layer_on_another_device_is_an_error_that_names_it(part):
    """Of a module without hooks that would move what it reads."""
    model = _model(FIRST, fuse=True, checkpointing=False)
    layer = model.model.layers[0]
    for step in range(3):
        _step(model, _ids(FIRST, seed=step))
    getattr(layer.self_attn if part == "k_proj" else layer.mlp, part).to(SECOND)
    with pytest.raises(ValueError, match=f"w must be on x's device {FIRST}, got {SECOND}"):
        _step(model, _ids(FIRST))
