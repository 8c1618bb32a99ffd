"""Two processes: DDP and FSDP2 over gloo on the CPU, over NCCL on two GPUs.

A mean of two ranks' fp32 gradients is exact but for the rounding of one sum, in whichever order: so
the gradients must have the bits of the mean of those that one process computes.
"""

import datetime
import gc
import warnings

import pytest
import torch
from helpers import assert_bitwise_equal
from tiny_model import make_llama

import lowbit

VOCABULARY = 120
RANKS = 2
PLACES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
        ],
    ),
]


def _model(device):
    """The same in every process. Plain attention: its gradients are deterministic."""
    torch.manual_seed(0)
    model = make_llama(VOCABULARY).to(torch.bfloat16)
    model = lowbit.prepare(model, r=4, lora_dtype=torch.float32, fuse=True)
    for module in model.modules():
        if isinstance(module, lowbit.nn.QLoRALinear):
            torch.nn.init.normal_(module.lora_B, std=0.1)
    model.config._attn_implementation = "eager"
    return model.to(device).train()


def _ids(rank, device, step=0):
    generator = torch.Generator().manual_seed(2 * step + rank)
    return torch.randint(2, VOCABULARY, (2, 40), generator=generator).to(device)


def _backward(model, ids):
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def _trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _mean_gradients(model, device, step=0):
    """Of one process that computes what each rank does, in turn; no `.grad` is left."""
    grads = []
    for rank in range(RANKS):
        model.zero_grad()
        _backward(model, _ids(rank, device, step))
        grads.append({name: p.grad for name, p in _trained(model).items()})
    model.zero_grad()
    return {name: sum(g[name] / RANKS for g in grads) for name in grads[0]}


def _assert_gradients(grads, expected, where):
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.any(), name
        assert_bitwise_equal(grads[name], grad, f"{where}: {name}")


def _process(rank, function, store, device_type):
    """One of two processes."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    options = {}
    if device_type == "cuda":
        torch.cuda.set_device(device)
        options = {"device_id": device}
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS,
        timeout=datetime.timedelta(minutes=3), **options,
    )  # fmt: skip
    function(rank, device)
    gc.collect()  # models hold the group; ended with the interpreter, its threads abort the process
    dist.destroy_process_group()


def _run(function, tmp_path, device_type):
    arguments = (function, str(tmp_path / "store"), device_type)
    torch.multiprocessing.spawn(_process, arguments, nprocs=RANKS)


def _ddp(rank, device):
    """Two steps of an 8-bit optimizer, each after what one process would have done."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    plain, model = _model(device), _model(device)
    place = [device] if device.type == "cuda" else None
    # Frozen weights and their scales are alike on all ranks: nothing to send in every call.
    ddp = DistributedDataParallel(model, device_ids=place, broadcast_buffers=False)
    optimizers = [lowbit.optim.AdamW8bit(_trained(m).values(), lr=1e-2) for m in (plain, model)]
    for step in range(2):
        expected = _mean_gradients(plain, device, step)
        ddp.zero_grad()
        _backward(ddp, _ids(rank, device, step))
        grads = {name: p.grad for name, p in _trained(model).items()}
        _assert_gradients(grads, expected, f"rank {rank}, step {step}")
        for name, p in _trained(plain).items():
            p.grad = expected[name]
        for optimizer in optimizers:
            optimizer.step()
    for name, p in _trained(model).items():
        assert_bitwise_equal(p, _trained(plain)[name], name)
        everywhere = [torch.empty_like(p.data) for _ in range(RANKS)]
        dist.all_gather(everywhere, p.data)
        assert_bitwise_equal(everywhere[0], everywhere[1], f"{name} of both ranks")


def _fsdp2(rank, device):
    """Sharded by layers; the packed weights as well where torch can, else whole on every rank."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    plain, ids = _model(device), _ids(rank, device)
    expected = _mean_gradients(plain, device)
    with torch.no_grad():
        logits = plain(input_ids=ids, use_cache=False).logits
    mesh = dist.init_device_mesh(device.type, (RANKS,))
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    for shards_packed in (False, True) if version >= (2, 13) else (False,):
        model = _model(device)
        whole = {p for p in model.parameters() if not (p.is_floating_point() or shards_packed)}
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh, ignored_params=whole)
        sharded = {type(p).__name__ for p in model.parameters() if not p.is_floating_point()}
        assert sharded == {"DTensor" if shards_packed else "Parameter"}
        with torch.no_grad():
            results = model(input_ids=ids, use_cache=False).logits
        assert_bitwise_equal(results, logits, "logits")
        _backward(model, ids)
        grads = {name: p.grad.full_tensor() for name, p in _trained(model).items()}
        _assert_gradients(grads, expected, f"rank {rank}, packed weights sharded: {shards_packed}")
        torch.optim.AdamW(_trained(model).values(), lr=1e-2).step()
        trained = {name: p.full_tensor() for name, p in _trained(model).items()}
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)  # on rank 0; empty elsewhere
        if rank == 0:
            whole = _model(device)
            whole.load_state_dict(state)
            for name, p in _trained(whole).items():
                assert_bitwise_equal(p, trained[name], f"gathered {name}")


@pytest.mark.parametrize("place", PLACES)
def test_ddp_computes_what_one_process_does(place, tmp_path):
    _run(_ddp, tmp_path, place)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_fsdp2_computes_what_one_process_does(place, tmp_path):
    _run(_fsdp2, tmp_path, place)
