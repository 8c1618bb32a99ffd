"""lowbit.save and lowbit.load: every bit comes back, nothing half-written or half-loaded stays."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from helpers import assert_bitwise_equal
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lowbit
from lowbit import adapters, modules, prepare
from lowbit.checkpoint import load, save
from lowbit.nn import Linear4bit, QLoRALinear
from lowbit.state import CheckpointError

TOKENS = torch.arange(8).view(2, 4)


class Toy(nn.Module):
    """Tied head, a buffer that is saved and one that is not, a layer with ragged rows."""

    def __init__(self, device=None, dtype=None):
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.embed = nn.Embedding(20, 100, **options)
        self.first = nn.Linear(100, 64, **options)
        self.second = nn.Linear(64, 100, bias=False, **options)
        self.norm = nn.LayerNorm(100, **options)
        self.lm_head = nn.Linear(100, 20, bias=False, **options)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.lm_head(self.norm(x + self.second(torch.tanh(self.first(x)))))


def prepared(dtype=torch.float32, **options):
    """A prepared model in which nothing has its initial value."""
    model = Toy(dtype=dtype)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(std=0.3)
        model.steps.fill_(17)
    model = prepare(model, **{"r": 4, "alpha": 8, "dropout": 0.1, **options})
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                tensor.normal_()
    return model


def assert_same_state(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert list(actual) == list(expected)
    for key in expected:
        assert_bitwise_equal(actual[key], expected[key], key)


@pytest.mark.parametrize("onto", ["meta", "plain", "prepared", "other rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, onto, dtype):
    model = prepared(dtype, lora_dtype=torch.float32)
    assert save(model, tmp_path / "saved") == tmp_path / "saved"
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "lowbit_config.json",
        "model.safetensors",
    ]
    target = Toy(device="meta" if onto == "meta" else None)
    if onto in ("prepared", "other rank"):
        target = prepare(target, r=4 if onto == "prepared" else 2, blocksize=32)
    loaded = load(target, tmp_path / "saved")
    assert_same_state(loaded, model)
    assert loaded.lm_head.weight is loaded.embed.weight
    assert loaded.training
    layer = loaded.first
    assert (layer.r, layer.alpha, layer.dropout, layer.scaling) == (4, 8, 0.1, 2.0)
    trained = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    x = TOKENS
    assert torch.equal(loaded.eval()(x), model.eval()(x))


@pytest.mark.gpu
def test_load_onto_a_device(tmp_path):
    model = prepared()
    save(model.cuda(), tmp_path)
    loaded = load(Toy(device="meta"), tmp_path, device="cuda")
    assert all(t.is_cuda for t in [*loaded.parameters(), *loaded.buffers()])
    assert_same_state(loaded.cpu(), model.cpu())


@pytest.mark.parametrize(
    "options",
    [
        {"r": 0},
        {"target_modules": ["first"]},
        {"quant_type": "fp4", "blocksize": 32},
        {"double_quant": False},
        {"double_quant_type": "fp8"},
        {"quant_type": "nf3"},
        {"layout": "flat"},
        {"use_rslora": True},
    ],
    ids=str,
)
def test_every_format_comes_back(tmp_path, options):
    model = prepared(**options)
    save(model, tmp_path)
    loaded = load(Toy(device="meta"), tmp_path)
    assert_same_state(loaded, model)
    for name, module in model.named_modules():
        twin = loaded.get_submodule(name)
        assert type(twin) is type(module)
        if isinstance(module, QLoRALinear):
            assert twin.scaling == module.scaling


def test_file_is_plain_safetensors_in_bitsandbytes_keys(tmp_path):
    save(prepared(), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["second.weight"].dtype == torch.uint8
    assert "second.weight.quant_state.bitsandbytes__nf4" in stored
    assert "first.weight.quant_state.lowbit__nf4" in stored  # K = 100 has ragged rows
    assert ("lm_head.weight" in stored) + ("embed.weight" in stored) == 1  # tied, stored once


def test_loaded_model_does_not_depend_on_the_file(tmp_path):
    model = prepared()
    save(model, tmp_path)
    loaded = load(Toy(device="meta"), tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(2000)
        file.write(b"\xff" * 20000)
    assert_same_state(loaded, model)


def test_merged_adapters_are_saved_unmerged(tmp_path):
    model = prepared()
    expected = copy.deepcopy(model)
    adapters.merge_adapter(model)
    save(model, tmp_path)
    assert_same_state(load(Toy(device="meta"), tmp_path), expected)


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path):
    model = prepared()
    compiled = torch.compile(model, backend="eager")
    loaded = load(Toy(), save(compiled, tmp_path / "saved"))
    assert_same_state(loaded, model)
    again = torch.compile(Toy(), backend="eager")
    assert load(again, tmp_path / "saved") is again
    assert_same_state(again._orig_mod, model)
    folder = adapters.save_adapter(compiled, tmp_path / "adapter")
    for target in (prepare(Toy(), r=0), torch.compile(prepare(Toy(), r=0), backend="eager")):
        assert adapters.load_adapter(target, folder) is target
        assert_bitwise_equal(target.first.lora_A, model.first.lora_A, "lora_A")


def bare(block):
    return block


def compiled(block):
    return torch.compile(block, backend="eager")


def compiled_in_place(block):
    block.compile(backend="eager")
    return block


def both(block):
    return compiled(checkpoint_wrapper(block))


def wrap_blocks(model, wrap):
    """A layer, one in a container that is wrapped too, a tied layer, and what is none."""
    model.second = wrap(nn.Sequential(wrap(model.second)))
    for name in ("first", "embed", "norm", "lm_head"):
        setattr(model, name, wrap(getattr(model, name)))
    return model


WRAPS = [compiled, compiled_in_place, checkpoint_wrapper, both]


@pytest.mark.parametrize("wrap", WRAPS)
def test_files_of_wrapped_blocks_are_those_of_the_model(tmp_path, wrap):
    model = prepared()
    save(wrap_blocks(copy.deepcopy(model), bare), tmp_path / "plain")
    save(wrap(wrap_blocks(model, wrap)), tmp_path / "wrapped")
    for name in ("lowbit_config.json", "model.safetensors"):
        first, second = ((tmp_path / f / name).read_bytes() for f in ("plain", "wrapped"))
        assert first == second, name


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("wrap", WRAPS)
def test_load_fills_wrapped_blocks(tmp_path, wrap, whole, quantized):
    model = wrap_blocks(prepared(), bare)
    save(model, tmp_path)
    target = wrap_blocks(prepare(Toy(), r=2) if quantized else Toy(), wrap)
    target = wrap(target) if whole else target
    assert load(target, tmp_path) is target
    save(target, tmp_path / "again")
    assert_same_state(load(wrap_blocks(Toy(), bare), tmp_path / "again"), model)
    inner = modules.plain(target)
    assert (
        type(modules.plain(inner.first))
        is type(modules.plain(modules.plain(inner.second)[0]))
        is QLoRALinear
    )
    assert modules.plain(inner.lm_head).weight is modules.plain(inner.embed).weight
    assert torch.equal(target.eval()(TOKENS), model.eval()(TOKENS))


def test_files_with_names_of_compiled_blocks_are_read(tmp_path):
    """Older versions wrote them."""
    model = prepared()
    save(model, tmp_path)
    for old, new in (("first", "first._orig_mod"), ("embed", "embed._orig_mod")):
        config = tmp_path / "lowbit_config.json"
        config.write_text(config.read_text().replace(f'"{old}', f'"{new}'))
        stored = load_file(tmp_path / "model.safetensors")
        renamed = {key.replace(f"{old}.", f"{new}.", 1): t for key, t in stored.items()}
        assert renamed.keys() != stored.keys() or f'"{new}.weight"' in config.read_text()
        save_file(renamed, tmp_path / "model.safetensors")
    assert_same_state(load(Toy(), tmp_path), model)
    target = Toy()
    target.first = compiled(target.first)
    load(target, tmp_path)
    assert_bitwise_equal(target.first.lora_A, model.first.lora_A, "lora_A")


def test_the_model_in_a_wrapper_is_found():
    """Wrappers pass on what they have not, and so may a model: what is inside of it is not it."""

    class Passing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = compiled(nn.Linear(2, 2))

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

    for model in (nn.Sequential(), nn.Linear(2, 2)):
        for wrap in (compiled, checkpoint_wrapper, both, lambda m: checkpoint_wrapper(compiled(m))):
            assert modules.plain(wrap(model)) is model
    for model in (nn.Linear(2, 2), Passing()):
        assert modules.plain(model) is model
        assert modules.plain(checkpoint_wrapper(model)) is model


@pytest.mark.parametrize("wrapper", ["ddp", "compiled ddp", "ddp of compiled", "data parallel"])
def test_a_parallel_model_is_saved_under_its_own_names(tmp_path, process_group, wrapper):
    def wrap(model):
        model = torch.compile(model, backend="eager") if wrapper == "ddp of compiled" else model
        if wrapper == "data parallel":
            return nn.DataParallel(model)
        model = nn.parallel.DistributedDataParallel(model)
        return torch.compile(model, backend="eager") if wrapper == "compiled ddp" else model

    model = prepared()
    wrapped = wrap(model)
    assert_same_state(load(Toy(), save(wrapped, tmp_path / "saved")), model)
    folder = adapters.save_adapter(wrapped, tmp_path / "adapter")
    loaded = adapters.load_adapter(prepare(Toy(), r=0), folder)
    assert_bitwise_equal(loaded.first.lora_A, model.first.lora_A, "lora_A")


@pytest.mark.parametrize("compiled", [False, True])
def test_ddp_must_not_be_filled(tmp_path, process_group, compiled):
    """It would not synchronize the new adapters: every process would train its own."""
    model = prepared()
    save(model, tmp_path / "saved")
    adapters.save_adapter(model, tmp_path / "adapter")
    before = dict(model.named_parameters())
    ddp = nn.parallel.DistributedDataParallel(model)
    plain = nn.parallel.DistributedDataParallel(Toy())
    if compiled:
        ddp, plain = (torch.compile(m, backend="eager") for m in (ddp, plain))
    for change in (
        lambda: load(ddp, tmp_path / "saved"),
        lambda: adapters.load_adapter(ddp, tmp_path / "adapter"),
        lambda: prepare(plain),
    ):
        with pytest.raises(ValueError, match="is wrapped in DistributedDataParallel"):
            change()
    assert all(p is before[name] for name, p in model.named_parameters())
    adapters.load_adapter(model, tmp_path / "adapter")


def test_sharded_models_are_refused(tmp_path, process_group):
    from torch.distributed.fsdp import fully_shard

    model, plain = prepared(), Toy()
    adapters.save_adapter(model, tmp_path / "adapter")
    for sharded in (model, plain):
        packed = {p for p in sharded.parameters() if not p.is_floating_point()}
        fully_shard(sharded, ignored_params=packed)
    before = dict(model.named_parameters())
    for function in (
        lambda: save(model, tmp_path / "saved"),
        lambda: load(model, tmp_path / "saved"),
        lambda: adapters.save_adapter(model, tmp_path / "saved"),
        lambda: adapters.load_adapter(model, tmp_path / "adapter"),
        lambda: adapters.merge(model),
        lambda: adapters.merge_adapter(model),
        lambda: adapters.drop_adapter(model),
        lambda: prepare(plain),
    ):
        with pytest.raises(ValueError, match=r"(weight|lora_A) is sharded \(FSDP2\)"):
            function()
    assert not (tmp_path / "saved").exists()
    assert all(p is before[name] for name, p in model.named_parameters())


def test_shared_layer_stays_shared(tmp_path):
    def build():
        layer = nn.Linear(64, 64)
        return nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})

    model = prepare(build(), r=2)
    save(model, tmp_path)
    loaded = load(build(), tmp_path)
    assert loaded["a"] is loaded["b"][0]
    assert_same_state(loaded, model)


def test_a_block_in_two_places_is_filled_and_stripped(tmp_path):
    def build():
        block = nn.Sequential(nn.Linear(64, 64))
        return nn.ModuleDict({"a": block, "b": block})

    model = prepare(build(), r=2)
    loaded = load(build(), save(model, tmp_path / "model"))
    assert_same_state(loaded, model)
    adapters.save_adapter(model, tmp_path / "adapter")
    other = adapters.load_adapter(prepare(build(), r=0), tmp_path / "adapter")
    assert_bitwise_equal(other["b"][0].lora_A, model["a"][0].lora_A)
    assert type(adapters.drop_adapter(other)["b"][0]) is Linear4bit
    assert type(adapters.merge(loaded)["b"][0]) is nn.Linear
    for each in (loaded, other):
        assert each["a"] is each["b"]


def test_buffers_that_overlap_are_saved_apart(tmp_path):
    def with_buffers(model, values):
        model.register_buffer("low", values[:4])
        model.register_buffer("high", values[2:])
        return model

    model = with_buffers(prepared(), torch.arange(6.0))
    save(model, tmp_path)
    assert_same_state(load(with_buffers(Toy(), torch.zeros(6)), tmp_path), model)


def test_a_loaded_model_refuses_a_state_dict_that_does_not_fit(tmp_path):
    """Before the layers in front of the damaged one are loaded."""
    model, state = prepared(), prepared(blocksize=32).state_dict()
    save(model, tmp_path)
    loaded = load(Toy(), tmp_path)
    del state["second.weight.absmax"]
    with pytest.raises(CheckpointError, match=r"second\.weight\.absmax is missing"):
        loaded.load_state_dict(state)
    assert_same_state(loaded, model)
    for key in [k for k in model.state_dict() if k.endswith("bias")]:
        with pytest.raises(CheckpointError, match=f"{key} must be a tensor, got list"):
            loaded.load_state_dict(model.state_dict() | {key: [0.0]})
    assert_same_state(loaded, model)


def test_a_layer_alone(tmp_path):
    layer = Linear4bit(64, 32)
    save(layer, tmp_path)
    assert_same_state(load(nn.Linear(64, 32), tmp_path), layer)


# ---- writing -------------------------------------------------------------------------------------


def test_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    folder = tmp_path / "saved"
    save(prepared(), folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr(json, "dumps", lambda *_, **__: 1 / 0)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(ZeroDivisionError):
            save(prepared(), target)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]  # no temporary folder, no new one


def test_two_processes_save_to_one_new_folder(tmp_path, monkeypatch):
    """The other one's folder appears just before this one's gets its name."""
    model, target = prepared(), tmp_path / "saved"
    rename = Path.rename

    def late(scratch, to):
        to.mkdir()
        (to / "model.safetensors").write_text("the other's")
        return rename(scratch, to)

    monkeypatch.setattr(Path, "rename", late)
    save(model, target)
    assert_same_state(load(Toy(), target), model)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_save_replaces_its_files_and_keeps_others(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    save(prepared(), tmp_path)
    second = prepared()
    save(second, tmp_path)
    assert_same_state(load(Toy(device="meta"), tmp_path), second)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    modes = {p.name: os.stat(p).st_mode for p in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["notes.txt"]


def test_saving_leaves_the_umask_alone(tmp_path, monkeypatch):
    """It is the process's: other threads would make files that everybody may write."""
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("the umask was set"))
    save(prepared(), tmp_path / "new")
    (tmp_path / "folder").mkdir()
    assert os.stat(tmp_path / "new").st_mode == os.stat(tmp_path / "folder").st_mode
    assert not [p for p in (tmp_path / "new").iterdir() if p.is_dir()]


@pytest.mark.parametrize(
    "function",
    [
        lambda folder: lowbit.save(None, folder),
        lambda folder: lowbit.load(None, folder),
        lambda folder: lowbit.adapters.merge(None),
        lambda folder: lowbit.adapters.save_adapter(None, folder),
        lambda folder: lowbit.adapters.load_adapter(None, folder),
        lambda folder: lowbit.fuse(None),
    ],
)
def test_what_is_no_model(tmp_path, function):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got NoneType"):
        function(tmp_path)


def test_save_refuses(tmp_path):
    with pytest.raises(ValueError, match="model has no quantized layer"):
        save(nn.Linear(4, 4), tmp_path)
    with pytest.raises(ValueError, match="is on the meta device and has no data"):
        save(prepare(Toy(device="meta")), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save(prepared(), tmp_path / "file")


# ---- reading -------------------------------------------------------------------------------------


def change_tensor(key, change):
    def apply(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        if change is None:
            del tensors[key]
        else:
            tensors[key] = change(tensors[key]).contiguous()
        save_file(tensors, path)

    return apply


def change_config(change):
    def apply(folder):
        path = folder / "lowbit_config.json"
        path.write_text(change(path.read_text()))

    return apply


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


BLOB = "second.weight.quant_state.bitsandbytes__nf4"
DAMAGES = {
    "cut file": (cut, "is cut off"),
    "short absmax": (change_tensor("first.weight.absmax", lambda t: t[1:]), "first.weight.absmax"),
    "bad JSON": (change_tensor(BLOB, lambda t: t[1:]), BLOB),
    "wrong dtype": (
        change_tensor("second.weight.absmax", lambda t: t.half()),
        "second.weight.absm",
    ),
    "no weight": (change_tensor("second.weight", None), "second.weight is missing"),
    "no blob": (change_tensor(BLOB, None), "second.weight.quant_state"),
    "no lora_A": (change_tensor("first.lora_A", None), "first.lora_A is missing"),
    "wrong lora_B": (change_tensor("first.lora_B", lambda t: t[1:]), "first.lora_B must be"),
    "no norm": (change_tensor("norm.weight", None), "norm.weight is missing"),
    "wrong norm": (change_tensor("norm.weight", lambda t: t[1:]), "norm.weight has shape"),
    "no bias": (change_tensor("first.bias", None), "first.bias is in only one"),
    "integer bias": (change_tensor("first.bias", lambda t: t.int()), "first.bias must be"),
    "config no JSON": (change_config(lambda t: t[:-9]), "lowbit_config.json is damaged"),
    "config list": (change_config(lambda t: "[]"), "lowbit_config.json is damaged"),
    "config layer no dict": (
        change_config(lambda t: json.dumps({**json.loads(t), "layers": {"first": 4}})),
        "does not describe",
    ),
    "config shared": (
        change_config(lambda t: json.dumps({**json.loads(t), "shared": {"first": []}})),
        "does not describe",
    ),
    "config version": (change_config(lambda t: t.replace('sion": 1', 'sion": 9')), "version 9"),
    "config options": (change_config(lambda t: t.replace('"r": 4', '"q": 4')), "layer first"),
    "config layer": (change_config(lambda t: t.replace('"first"', '"third"')), "third is a 4-bit"),
    "config dropout": (change_config(lambda t: t.replace("0.1", "1.5")), "dropout must lie in"),
}


@pytest.mark.parametrize("case", DAMAGES)
@pytest.mark.parametrize("onto", ["plain", "prepared"])
def test_damaged_checkpoint_changes_nothing(tmp_path, case, onto):
    damage, message = DAMAGES[case]
    save(prepared(), tmp_path)
    damage(tmp_path)
    target = Toy() if onto == "plain" else prepared()
    modules, before = list(target.modules()), copy.deepcopy(target)
    with pytest.raises(CheckpointError, match=message):
        load(target, tmp_path)
    assert all(a is b for a, b in zip(target.modules(), modules, strict=True))
    assert_same_state(target, before)


def test_checkpoint_of_another_model(tmp_path):
    save(prepared(), tmp_path)
    other = Toy()
    other.second = nn.Linear(64, 90, bias=False)
    with pytest.raises(CheckpointError, match=r"second\.weight has shape \[100, 64\]"):
        load(other, tmp_path)
    other = Toy()
    other.extra = nn.Linear(8, 8)
    with pytest.raises(CheckpointError, match=r"extra\.weight is missing"):
        load(other, tmp_path)
    other = Toy()
    del other.norm
    with pytest.raises(CheckpointError, match=r"norm\.\w+ is in the checkpoint but not in"):
        load(other, tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lowbit_config\.json"):
        load(Toy(), tmp_path)
    save(prepared(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load(Toy(), tmp_path)
    with pytest.raises(ValueError, match="folder is missing"):
        load(Toy())
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*/nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load(tmp_path)


# ---- transformers --------------------------------------------------------------------------------


def test_llama_folder_is_complete(tmp_path):
    """config.json and generation_config.json come along, so the folder alone is enough."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config.max_new_tokens = 7
    model = prepare(model, r=4).eval()
    save(model, tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.generation_config.max_new_tokens == 7
    assert_same_state(loaded, model)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
