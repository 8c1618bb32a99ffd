"""Adapters go to PEFT and come from PEFT, and merging and switching do what they say."""

import copy
import json

import pytest
import torch
from helpers import assert_bitwise_equal
from safetensors.torch import load_file, save_file
from torch import nn

import lowbit
from lowbit import adapters, prepare
from lowbit.nn import Linear4bit, QLoRALinear
from lowbit.state import CheckpointError

TOKENS = torch.arange(12).view(2, 6)


def llama():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def mlp():
    """Names that are endings of each other: "0" and "1.0"."""
    inner = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    return nn.Sequential(nn.Linear(64, 64), inner, nn.Linear(64, 64))


def randomize(model):
    """Adapters that take part; the base is untouched."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.2)
    return model


def dequantized(model, plain):
    """The plain model with the weights that quantization left."""
    plain = copy.deepcopy(plain)
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            plain.get_submodule(name).weight.data = layer.quantized_weight.dequantize()
    return plain


def peft_load(base, folder):
    peft = pytest.importorskip("peft", reason="needs PEFT")
    return peft.PeftModel.from_pretrained(base, folder).eval()


# ---- to PEFT -------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_peft_computes_what_lowbit_computes(tmp_path, targets, use_rslora):
    plain = llama()
    model = prepare(
        copy.deepcopy(plain), r=4, alpha=6, target_modules=targets, use_rslora=use_rslora
    )
    randomize(model)
    adapters.save_adapter(model, tmp_path)
    peft_model = peft_load(dequantized(model, plain), tmp_path)
    expected = model(TOKENS).logits
    torch.testing.assert_close(peft_model(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
    with adapters.disable_adapter(model):
        assert (model(TOKENS).logits - expected).abs().max() > 1e-2  # the adapter mattered


def test_files_are_pefts(tmp_path):
    model = prepare(llama(), r=4, alpha=6, dropout=0.1, target_modules=["q_proj"])
    adapters.save_adapter(model, tmp_path, base_model_name_or_path="some/model")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    assert_bitwise_equal(
        tensors[key], model.model.layers[1].self_attn.q_proj.lora_A.detach(), "lora_A"
    )
    assert len(tensors) == 4
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model"
    assert config["task_type"] == "CAUSAL_LM"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0.1)
    peft = pytest.importorskip("peft", reason="needs PEFT")
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, peft.LoraConfig)
    # PEFT writes the same fields, so that readers of its files find what they look for.
    peft.LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(tmp_path / "peft")
    theirs = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert set(config) <= set(theirs)


@pytest.mark.parametrize("first_is_rslora", [False, True])
def test_layers_that_differ_and_names_that_end_alike(tmp_path, first_is_rslora):
    """The first one's rule is that of the file."""
    plain = mlp()
    layers = [
        QLoRALinear.from_linear(plain[0], r=2, alpha=4, use_rslora=first_is_rslora),
        QLoRALinear.from_linear(plain[2], r=8, alpha=4, use_rslora=not first_is_rslora),
    ]
    model = nn.Sequential(layers[0], copy.deepcopy(plain[1]), layers[1])
    randomize(model)
    adapters.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == "0|2"  # a list ["0", "2"] would also adapt "1.0"
    peft_model = peft_load(dequantized(model, plain), tmp_path)
    x = torch.randn(3, 64)
    torch.testing.assert_close(peft_model(x), model(x), rtol=1e-4, atol=1e-5)
    loaded = adapters.load_adapter(prepare(plain, r=0, target_modules=[]), tmp_path)
    assert [loaded[0].r, loaded[2].r] == [2, 8]
    assert loaded[2].scaling == pytest.approx(model[2].scaling)


# ---- from PEFT -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {
            "target_modules": ["q_proj", "up_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
            "alpha_pattern": {"down_proj": 32},
        },
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    ],
    ids=["all", "rslora", "patterns", "gaussian"],
)
def test_adapters_of_peft_load(tmp_path, options):
    peft = pytest.importorskip("peft", reason="needs PEFT")
    plain = llama()
    model = prepare(copy.deepcopy(plain), r=0)
    base = dequantized(model, plain)
    peft_model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, **options)).eval()
    randomize(peft_model)
    peft_model.save_pretrained(tmp_path)
    model = adapters.load_adapter(model, tmp_path)
    out = model(TOKENS).logits
    torch.testing.assert_close(out, peft_model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    again = tmp_path / "again"
    adapters.save_adapter(model, again)
    theirs = load_file(tmp_path / "adapter_model.safetensors")
    ours = load_file(again / "adapter_model.safetensors")
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert_bitwise_equal(ours[key], tensor, key)
    reread = peft_load(dequantized(model, plain), again)
    torch.testing.assert_close(reread(TOKENS).logits, out, rtol=1e-4, atol=1e-5)


def test_loading_replaces_the_adapters_there_were(tmp_path):
    source = randomize(prepare(mlp(), r=2, target_modules=["1.0"]))
    adapters.save_adapter(source, tmp_path)
    model = randomize(prepare(mlp(), r=8))
    weight = model[0].weight.data_ptr()
    model = adapters.load_adapter(model.eval(), tmp_path, trainable=False)
    assert type(model[0]) is Linear4bit
    assert type(model[1][0]) is QLoRALinear
    assert model[1][0].r == 2
    assert model[0].weight.data_ptr() == weight
    assert not model[1][0].training
    assert not any(p.requires_grad for p in model.parameters() if p.dim() == 2)
    half = adapters.load_adapter(model, tmp_path, dtype=torch.bfloat16)
    assert half[1][0].lora_A.dtype == torch.bfloat16
    assert half[1][0].lora_A.requires_grad


def saved_adapter(folder):
    model = randomize(prepare(mlp(), r=2, target_modules=["1.0"]))
    adapters.save_adapter(model, folder)
    return model


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("use_dora", True, "lowbit has no DoRA"),
        ("lora_bias", True, "biases in lora_B"),
        ("bias", "all", "bias must be 'none'"),
        ("modules_to_save", ["lm_head"], "trained modules beside"),
        ("peft_type", "ADALORA", "peft_type must be LORA"),
        ("init_lora_weights", "pissa_niter_4", "needs the base weight it changed"),
        ("fan_in_fan_out", True, "Conv1D"),
    ],
)
def test_other_kinds_of_adapters_are_refused(tmp_path, field, value, message):
    model = saved_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        adapters.load_adapter(model, tmp_path)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank_pattern", ["1.0"]),
        ("rank_pattern", {"(": 4}),
        ("alpha_pattern", 5),
        ("alpha_pattern", {"(": 4}),
        ("lora_dropout", "0.1"),
        ("lora_dropout", 1),
        ("lora_alpha", float("nan")),
    ],
)
def test_damaged_options_are_named(tmp_path, field, value):
    model = saved_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(CheckpointError, match=f"is damaged: .*{field}"):
        adapters.load_adapter(model, tmp_path)


@pytest.mark.parametrize("alpha", ["8", float("inf")])
def test_an_alpha_that_is_no_number_is_named(tmp_path, alpha):
    model = saved_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "alpha_pattern": {"0": alpha}}))
    with pytest.raises(
        CheckpointError, match=r"is damaged: the lora_alpha of (0|1\.0) is (inf|'8')"
    ):
        adapters.load_adapter(model, tmp_path)


def test_dora_of_peft_is_refused(tmp_path):
    peft = pytest.importorskip("peft", reason="needs PEFT")
    config = peft.LoraConfig(r=4, target_modules=["0"], use_dora=True)
    peft.get_peft_model(mlp(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lowbit has no DoRA"):
        adapters.load_adapter(prepare(mlp(), r=0), tmp_path)


KEY = "base_model.model.1.0.lora_"


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (KEY + "A.weight", None, r"1\.0\.lora_A\.weight is missing"),
        (KEY + "B.weight", lambda t: t[1:], r"1\.0\.lora_B\.weight must be \[64, 2\]"),
        (KEY + "A.weight", lambda t: t.T, r"1\.0\.lora_A\.weight must be \[2, 64\]"),
        (KEY + "A.weight", lambda t: t * float("nan"), "must be a finite floating matrix"),
        (KEY + "magnitude_vector", torch.ones(3), "is no LoRA matrix"),
        ("module." + KEY + "A.weight", torch.ones(2, 64), r"DistributedDataParallel's \.module"),
        ("base_model.model.9.lora_A.weight", torch.ones(2, 64), "9.lora_B.weight is missing"),
    ],
)
def test_damaged_adapter_changes_nothing(tmp_path, key, change, message):
    model = saved_adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    if change is None:
        del tensors[key]
    else:
        tensors[key] = change(tensors[key]).contiguous() if callable(change) else change
    save_file(tensors, path)
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        adapters.load_adapter(model, tmp_path)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))


def test_adapter_of_another_model(tmp_path):
    saved_adapter(tmp_path)
    with pytest.raises(CheckpointError, match=r"1\.0 .* is absent in the model$"):
        adapters.load_adapter(nn.Sequential(Linear4bit(64, 64)), tmp_path)
    needs = r"1\.0 .* is a Linear in the model, not a 4-bit layer; call lowbit\.prepare"
    with pytest.raises(CheckpointError, match=needs):
        adapters.load_adapter(mlp(), tmp_path)
    other = nn.Sequential(Linear4bit(64, 64), nn.Sequential(Linear4bit(64, 32)))
    with pytest.raises(CheckpointError, match=r"lora_B\.weight must be \[32, 2\]"):
        adapters.load_adapter(other, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        adapters.load_adapter(mlp(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        adapters.load_adapter(mlp(), tmp_path / "nowhere")


def test_alpha_of_numpy_is_written_as_a_number(tmp_path):
    numpy = pytest.importorskip("numpy")
    model = prepare(mlp(), r=4, alpha=numpy.float32(12))
    adapters.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 12
    assert type(model[0].alpha) is float


def test_layers_that_share_a_parameter(tmp_path):
    model = randomize(prepare(mlp(), r=4))
    model[2].lora_A = model[0].lora_A
    adapters.save_adapter(model, tmp_path)
    back = adapters.load_adapter(prepare(mlp(), r=0), tmp_path)
    for name in "02":
        assert_bitwise_equal(back.get_submodule(name).lora_A, model[0].lora_A, name)


def test_save_needs_an_adapter_with_data(tmp_path):
    with pytest.raises(ValueError, match="model has no lowbit adapter"):
        adapters.save_adapter(prepare(mlp(), r=0), tmp_path)
    with pytest.raises(ValueError, match=r"lora_A is on the meta device"):
        adapters.save_adapter(prepare(mlp().to("meta"), r=2), tmp_path)


def _compiled(block):
    return torch.compile(block, backend="eager")


def _checkpointed(block):
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

    return checkpoint_wrapper.checkpoint_wrapper(block)


@pytest.mark.parametrize("wrap", [_compiled, _checkpointed])
def test_wrapped_blocks_are_saved_under_their_own_names(tmp_path, wrap):
    plain = randomize(prepare(llama(), r=4))
    adapters.save_adapter(plain, tmp_path / "plain")
    wrapped = copy.deepcopy(plain)
    attention = wrapped.model.layers[0].self_attn
    attention.q_proj = wrap(attention.q_proj)  # a block that is a layer itself
    wrapped.model.layers[1] = wrap(wrapped.model.layers[1])
    adapters.save_adapter(wrapped, tmp_path / "wrapped")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        first, second = ((tmp_path / f / name).read_bytes() for f in ("plain", "wrapped"))
        assert first == second, name
    before = [p.detach().clone() for p in wrapped.parameters()]
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.zeros_(p)
    adapters.load_adapter(wrapped, tmp_path / "plain")
    for p, expected in zip(wrapped.parameters(), before, strict=True):
        assert_bitwise_equal(p, expected)


def test_files_with_names_of_compiled_blocks_are_read(tmp_path):
    saved = saved_adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    names = {key: key.replace(".1.0.", ".1._orig_mod.0.") for key in load_file(path)}
    assert any(key != name for key, name in names.items())
    save_file({names[key]: tensor for key, tensor in load_file(path).items()}, path)
    loaded = adapters.load_adapter(prepare(mlp(), r=0), tmp_path)
    assert_bitwise_equal(loaded[1][0].lora_A, saved[1][0].lora_A)


@pytest.mark.parametrize("key", ["own", "stored"])
@pytest.mark.parametrize("stored", ["1._orig_mod.0", "1.0._checkpoint_wrapped_module"])
def test_patterns_hold_for_names_with_wrappers(tmp_path, stored, key):
    """A key is for the name in the file, as older versions wrote it, or for the model's own."""
    saved = prepare(mlp(), r=2, alpha=8)
    odd = prepare(mlp(), r=4, alpha=24)
    saved[1][0] = odd[1][0]
    adapters.save_adapter(saved, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k.replace(".1.0.", f".{stored}."): t for k, t in load_file(path).items()}, path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for field in ("rank_pattern", "alpha_pattern"):
        assert list(config[field]) == [r"^1\.0"]
        if key == "stored":
            config[field] = {"^" + stored.replace(".", r"\."): config[field][r"^1\.0"]}
    path.write_text(json.dumps(config))
    loaded = adapters.load_adapter(prepare(mlp(), r=0), tmp_path)
    assert (loaded[0].r, loaded[0].alpha) == (2, 8)
    assert (loaded[1][0].r, loaded[1][0].alpha) == (4, 24)
    assert_bitwise_equal(loaded[1][0].lora_A, saved[1][0].lora_A)


def test_a_compiled_layer_computes_with_its_replacement(tmp_path):
    """torch.compile binds the forward of the layer it was given."""
    saved_adapter(tmp_path)
    model, x = mlp(), torch.randn(3, 64)
    model[1][0] = _compiled(model[1][0])
    model = adapters.load_adapter(prepare(model, r=0), tmp_path)
    layer = model[1][0]
    assert isinstance(layer._orig_mod, QLoRALinear)
    assert_bitwise_equal(layer(x), layer._orig_mod(x))


# ---- merging and switching -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_dense_merge(dtype):
    model = randomize(prepare(mlp(), r=4)).eval()
    x = torch.randn(5, 64)
    expected = model(x)
    merged = adapters.merge(model, dtype=dtype)
    assert merged is model
    assert all(type(m) is not QLoRALinear for m in merged.modules())
    assert merged[0].weight.dtype == (dtype or torch.float32)
    error = (merged.float()(x) - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype is None else 1e-2)
    with pytest.raises(ValueError, match="nothing to merge"):
        adapters.merge(merged)


def test_reversible_merge():
    model = randomize(prepare(mlp(), r=4)).eval()
    x = torch.randn(5, 64)
    expected, before = model(x), copy.deepcopy(model.state_dict())
    report = adapters.merge_adapter(model)
    assert set(report) == {"0", "1.0", "2"}
    assert all(0 < e.weight_error < 0.2 and e.update > 0 for e in report.values())
    merged = model(x)
    assert 0 < (merged - expected).norm() / expected.norm() < 0.3
    with pytest.raises(ValueError, match="0: the adapter is merged already"):
        adapters.merge_adapter(model)
    with pytest.raises(ValueError, match="an adapter is merged into its weight"):
        adapters.disable_adapter(model)
    adapters.unmerge_adapter(model)
    for key, value in model.state_dict().items():
        assert_bitwise_equal(value, before[key], key)
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="no adapter of the model is merged"):
        adapters.unmerge_adapter(model)


def test_failed_merge_merges_nothing():
    model = randomize(prepare(mlp(), r=4))
    with torch.no_grad():
        model[2].lora_B[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"2: weight has .* NaN or Inf"):
        adapters.merge_adapter(model)
    assert not any(layer.merged for layer in (model[0], model[1][0], model[2]))


def test_an_adapter_that_is_off_is_not_merged():
    """It would take part again, in a block that computes without it."""
    model = randomize(prepare(mlp(), r=4)).eval()
    x = torch.randn(5, 64)
    with adapters.disable_adapter(model):
        base = model(x)
        with pytest.raises(ValueError, match="0: the adapter is switched off"):
            adapters.merge_adapter(model)
        assert torch.equal(model(x), base)
    model[2].adapter_enabled = False
    with pytest.raises(ValueError, match="2: the adapter is switched off"):
        adapters.merge_adapter(model)
    assert not any(layer.merged for layer in (model[0], model[1][0], model[2]))


def test_final_merge_to_four_bits():
    model = randomize(prepare(mlp(), r=4)).eval()
    adapters.merge_adapter(model)
    x = torch.randn(5, 64)
    expected = model(x)
    model = adapters.drop_adapter(model)
    assert type(model[0]) is Linear4bit
    assert torch.equal(model(x), expected)


def test_disable_and_enable():
    model = randomize(prepare(mlp(), r=4)).eval()
    x = torch.randn(5, 64)
    adapted = model(x)
    with adapters.disable_adapter(model):
        base = model(x)
    assert torch.equal(model(x), adapted)
    assert not torch.equal(base, adapted)
    adapters.disable_adapter(model)
    assert torch.equal(model(x), base)
    with adapters.disable_adapter(model):
        pass
    assert torch.equal(model(x), base)  # it was off before the block
    adapters.enable_adapter(model)
    assert torch.equal(model(x), adapted)
    assert torch.equal(adapters.drop_adapter(model)(x), base)


def test_shared_layer_is_merged_once():
    layer = nn.Linear(64, 64)
    model = prepare(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)}), r=2)
    model = adapters.merge(randomize(model))
    assert type(model["a"]) is nn.Linear
    assert model["a"] is model["b"][0]


def test_public_names():
    for name in adapters.__all__:
        assert callable(getattr(lowbit.adapters, name))
