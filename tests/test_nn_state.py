"""State dicts of Linear4bit and QLoRALinear, and layers that are sharded."""

import gc

import pytest
import torch
from helpers import assert_bitwise_equal
from nn_layers import K, N, R, assert_same_state, linear, qlora
from torch import nn

from lowbit.nn import Linear4bit, QLoRALinear

# ---- state dict ----------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"double_quant": False},
        {"blocksize": 32, "quant_type": "fp4"},
        {"layout": "flat"},
        {"nested_blocksize": 32},
    ],
)
def test_load_adopts_the_format_of_the_checkpoint(options, assign):
    source = qlora(torch.bfloat16, **options)
    target = QLoRALinear(K, N, r=R, dtype=torch.bfloat16)
    stored = source.state_dict()
    result = target.load_state_dict(stored, strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_state(target, source)
    assert (target.weight.data_ptr() == stored["weight"].data_ptr()) == assign
    x = torch.randn(3, K, dtype=torch.bfloat16)
    target.alpha, target.scaling = source.alpha, source.scaling
    assert torch.equal(target(x), source(x))


def test_plain_load_copies_in_place():
    source, target = qlora(), qlora()
    parameter, pointer = target.weight, target.weight.data_ptr()
    target.load_state_dict(source.state_dict())
    assert target.weight is parameter
    assert target.weight.data_ptr() == pointer
    assert_same_state(target, source)


def test_load_into_a_meta_layer():
    source = qlora()
    target = QLoRALinear(K, N, r=R, device="meta")
    with pytest.raises(RuntimeError, match=r"is on the meta device .* assign=True"):
        target.load_state_dict(source.state_dict())
    target.load_state_dict(source.state_dict(), assign=True)
    assert_same_state(target, source)


def test_strict_names_what_is_missing_or_surplus():
    stored = qlora().state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"lora_A", "lora_B"'):
        Linear4bit(K, N).load_state_dict(stored)
    del stored["lora_A"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"lora_A"'):
        qlora().load_state_dict(stored)
    only_adapter = {"lora_A": torch.zeros(R, K), "lora_B": torch.zeros(N, R)}
    target = qlora()
    assert "weight" in target.load_state_dict(only_adapter, strict=False).missing_keys
    assert not target.lora_A.any()


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("weight.absmax", lambda t: t[:-1]),
        ("weight.quant_state.lowbit__nf4", lambda t: t[:-1]),
        ("weight", lambda t: t[:-1]),
        ("bias", lambda t: t[:-1]),
        ("lora_A", lambda t: t[:-1]),
        ("lora_A", lambda t: t.tolist()),
        ("weight", lambda t: t.tolist()),
        ("weight.absmax", lambda t: None),
        ("weight.quant_map", None),
    ],
)
def test_damaged_entry_changes_nothing(key, change):
    stored, target = qlora().state_dict(), qlora()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    if change is None:
        del stored[key]
    else:
        stored[key] = change(stored[key])
    with pytest.raises(RuntimeError, match=key):
        target.load_state_dict(stored)
    for name, value in target.state_dict().items():
        assert_bitwise_equal(value, before[name], name)


def test_weight_of_another_shape_is_refused():
    other = Linear4bit.from_linear(nn.Linear(N, K))  # same number of elements
    with pytest.raises(RuntimeError, match=r"weight: the checkpoint has \[96, 48\]"):
        Linear4bit(K, N).load_state_dict(other.state_dict())


def test_state_dict_of_codebooks_shares_nothing():
    """safetensors refuses shared storage, and layers may share their codebook tensors."""
    layer = Linear4bit.from_linear(linear())
    twin = Linear4bit.from_quantized(layer.quantized_weight)
    first, second = layer.state_dict(), twin.state_dict()
    for key in ("weight.quant_map", "weight.nested_quant_map"):
        assert first[key].data_ptr() != second[key].data_ptr()


# ---- sharding ------------------------------------------------------------------------------------


def _sharded(rank, store):
    """One of two processes."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    _compute_sharded(dist.init_device_mesh("cpu", (2,)))
    gc.collect()  # models hold the group; ended with the interpreter, its threads abort the process
    dist.destroy_process_group()


def _compute_sharded(mesh):
    """FSDP2 computes, saves and loads what the plain model does."""
    from torch.distributed.checkpoint import state_dict as dcp
    from torch.distributed.fsdp import fully_shard

    def build(seed, shard):
        torch.manual_seed(seed)
        model = nn.Sequential(qlora(), nn.ReLU(), Linear4bit(N, 33, blocksize=32))
        for part in (model[0], model[2], model) if shard else ():
            fully_shard(part, mesh=mesh)
        return model

    plain, model, other = build(0, False), build(0, True), build(1, True)
    x = torch.randn(6, K)
    expected = plain(x)
    assert torch.equal(model(x), expected)
    expected.sum().backward()
    model(x).sum().backward()
    torch.testing.assert_close(model[0].lora_A.grad.full_tensor(), plain[0].lora_A.grad)
    whole = dcp.StateDictOptions(full_state_dict=True)
    gathered = dcp.get_model_state_dict(model, options=whole)
    for key, value in plain.state_dict().items():
        assert_bitwise_equal(gathered.pop(key), value, key)
    assert not gathered
    dcp.set_model_state_dict(other, plain.state_dict(), options=whole)
    assert torch.equal(other(x), expected)
    again = build(2, True)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), expected)


@pytest.mark.slow
@pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13),
    reason="FSDP2 before torch 2.13 refuses integer parameters (seen in 2.11)",
)
def test_fsdp2_and_distributed_state_dicts(tmp_path):
    torch.multiprocessing.spawn(_sharded, (str(tmp_path / "store"),), nprocs=2)
