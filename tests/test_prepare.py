"""lowbit.prepare: which layers change, what they become, and how much memory is held on the way."""

import gc
import json
import weakref

import pytest
import torch
from helpers import assert_bitwise_equal
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lowbit
from lowbit import prepare
from lowbit.modules import own_name
from lowbit.nn import Linear4bit, QLoRALinear
from lowbit.state import CheckpointError


class Block(nn.Module):
    def __init__(self, width, device=None):
        super().__init__()
        self.q_proj = nn.Linear(width, width, device=device)
        self.up_proj = nn.Linear(width, 2 * width, bias=False, device=device)
        self.down_proj = nn.Linear(2 * width, width, bias=False, device=device)
        self.norm = nn.LayerNorm(width, device=device)

    def forward(self, x):
        return self.norm(x + self.down_proj(torch.relu(self.up_proj(self.q_proj(x)))))


class Toy(nn.Module):
    """Embedding, blocks and an lm_head that may be tied to the embedding."""

    def __init__(self, width=64, layers=2, vocabulary=40, tied=False, device=None):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, device=device)
        self.layers = nn.ModuleList(Block(width, device) for _ in range(layers))
        self.lm_head = nn.Linear(width, vocabulary, bias=False, device=device)
        self.register_buffer("scale", torch.ones(1, device=device))
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) * self.scale
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


TOKENS = torch.arange(12).view(2, 6)


def types(model):
    return {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def assert_same_state(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert list(actual) == list(expected)
    for key in expected:
        assert_bitwise_equal(actual[key], expected[key], key)


# ---- which layers --------------------------------------------------------------------------------


def test_all_linear_layers_but_the_head(device):
    model = Toy().to(device)
    plain = model(TOKENS.to(device))
    model = prepare(model, r=4, alpha=8)
    kinds = types(model)
    assert kinds.pop("lm_head") == "Linear"
    assert set(kinds.values()) == {"QLoRALinear"}
    assert len(kinds) == 6
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{part}" for name in kinds for part in "AB"}
    out = model(TOKENS.to(device))
    assert (out - plain).norm() < 0.3 * plain.norm()  # quantization noise, no more
    out.sum().backward()
    assert model.layers[0].q_proj.lora_B.grad.abs().sum() > 0


def test_targets_get_adapters_and_the_rest_is_quantized():
    kinds = types(prepare(Toy(), r=4, target_modules=["q_proj", "layers.1.up_proj"]))
    adapted = {name for name, kind in kinds.items() if kind == "QLoRALinear"}
    assert adapted == {"layers.0.q_proj", "layers.1.q_proj", "layers.1.up_proj"}
    assert sum(kind == "Linear4bit" for kind in kinds.values()) == 3


@pytest.mark.parametrize("pattern", [r"layers\.\d\.q_proj", r".*q_proj", "q_proj"])
def test_a_string_is_a_regular_expression(pattern):
    kinds = types(prepare(Toy(), r=4, target_modules=pattern))
    adapted = [name for name, kind in kinds.items() if kind == "QLoRALinear"]
    assert adapted == ["layers.0.q_proj", "layers.1.q_proj"]


def test_rank_zero_only_quantizes():
    model = prepare(Toy(), r=0)
    assert set(types(model).values()) == {"Linear4bit", "Linear"}
    assert not any(p.requires_grad for p in model.parameters())


def test_skip_modules_replaces_the_default():
    kinds = types(prepare(Toy(), r=4, skip_modules=["q_proj"]))
    assert kinds["layers.0.q_proj"] == "Linear"
    assert kinds["lm_head"] == "QLoRALinear"


def test_an_explicit_target_overrides_the_default_skip():
    assert types(prepare(Toy(), r=4, target_modules=["lm_head"]))["lm_head"] == "QLoRALinear"


def test_tied_head_is_left_alone_even_when_not_skipped():
    model = prepare(Toy(tied=True), r=4, skip_modules=[])
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.embed.weight
    with pytest.raises(ValueError, match="the weight of lm_head is tied"):
        prepare(Toy(tied=True), r=4, target_modules=["lm_head"])


def test_a_layer_used_twice_stays_one_layer():
    shared = nn.Linear(64, 64)
    model = prepare(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}), r=4)
    assert isinstance(model["a"], QLoRALinear)
    assert model["a"] is model["b"][0]


def test_a_linear_layer_itself():
    assert isinstance(prepare(nn.Linear(64, 64), r=4), QLoRALinear)


def test_layers_that_only_look_linear_are_left_alone():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.ModuleDict({"own": Scaled(8, 8), "mha": nn.MultiheadAttention(8, 2)})
    model["plain"] = nn.Linear(8, 8)
    prepare(model, r=2)
    assert type(model["own"]) is Scaled
    assert type(model["mha"].out_proj).__name__ == "NonDynamicallyQuantizableLinear"
    assert isinstance(model["plain"], QLoRALinear)


@pytest.mark.parametrize("merged", [False, True])
def test_encoder_layers_of_torch_call_their_layers(merged):
    """Their fast path, in eval mode without gradients, would read the weight itself."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    model = prepare(nn.TransformerEncoder(layer, 2, enable_nested_tensor=True), r=2).eval()
    if merged:
        model = lowbit.adapters.merge(model)
    x = torch.randn(2, 5, 64)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = model(x, src_key_padding_mask=mask).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=mask), expected)


def test_what_transformers_keeps_in_fp32_is_left_alone():
    """T5 casts activations to the dtype of wo's weight."""
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(**sizes, vocab_size=50, decoder_start_token_id=0)
    model = prepare(transformers.T5ForConditionalGeneration(config), r=2)
    kinds = types(model)
    assert kinds["encoder.block.0.layer.1.DenseReluDense.wi"] == "QLoRALinear"
    assert kinds["encoder.block.0.layer.1.DenseReluDense.wo"] == "Linear"
    ids = torch.arange(6).view(1, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    named = prepare(transformers.T5ForConditionalGeneration(config), r=2, target_modules=["wo"])
    assert types(named)["encoder.block.0.layer.1.DenseReluDense.wo"] == "QLoRALinear"


def test_adapters_on_a_quantized_model_share_its_weights():
    model = prepare(Toy(), r=0)
    pointer = model.layers[0].q_proj.weight.data_ptr()
    prepare(model, r=4)
    assert isinstance(model.layers[0].q_proj, QLoRALinear)
    assert model.layers[0].q_proj.weight.data_ptr() == pointer


def test_options_reach_the_layers():
    model = prepare(
        Toy(),
        r=4,
        alpha=6,
        dropout=0.25,
        quant_type="fp4",
        blocksize=32,
        double_quant=False,
        use_rslora=True,
        lora_dtype=torch.bfloat16,
    )
    layer = model.layers[0].q_proj
    assert (layer.r, layer.alpha, layer.dropout, layer.scaling) == (4, 6, 0.25, 3.0)
    assert (layer.quant_type, layer.blocksize, layer.double_quant) == ("fp4", 32, False)
    assert layer.lora_A.dtype == torch.bfloat16


def test_same_seed_gives_the_same_adapters_from_both_ways(tmp_path):
    model = Toy()
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(4)
    expected = prepare(model, r=4)
    torch.manual_seed(4)
    actual = prepare(Toy(device="meta"), r=4, weights=dict(reversed(stored.items())))
    assert_same_state(actual, expected)


@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        ["up_proj", "layers.1.down_proj"],
        r"layers\.\d\.(up|down)_proj",
        ["layers.1._orig_mod.down_proj", "layers.0.up_proj._orig_mod"],
    ],
    ids=str,
)
def test_names_mean_compiled_blocks_too(targets):
    """Layers inside were left without an adapter, and the output embedding was quantized."""
    model = Toy()
    model.layers[0].up_proj = torch.compile(model.layers[0].up_proj, backend="eager")
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    model.lm_head = torch.compile(model.lm_head, backend="eager")
    found = {
        own_name(name): type(module).__name__
        for name, module in prepare(model, r=2, target_modules=targets).named_modules()
        if isinstance(module, nn.Linear)
    }
    own = targets
    if isinstance(targets, list):
        own = [own_name(target) for target in targets]
    assert found == types(prepare(Toy(), r=2, target_modules=own))


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, lambda m: torch.compile(m, backend="eager")])
def test_a_wrapped_output_embedding_is_left_alone(wrap):
    class Reporting(nn.Sequential):
        def get_output_embeddings(self):
            return self[1]

    model = prepare(Reporting(nn.Linear(64, 64), wrap(nn.Linear(64, 40))), r=2)
    assert list(types(model).values()) == ["QLoRALinear", "Linear"]


# ---- what is refused -----------------------------------------------------------------------------


def test_unknown_names_list_close_ones():
    with pytest.raises(ValueError, match=r"no linear layer is called 'q_prj'; close names: q_proj"):
        prepare(Toy(), target_modules=["q_prj"])
    with pytest.raises(ValueError, match="embed is of type Embedding, which is not supported"):
        prepare(Toy(), target_modules=["embed"])
    with pytest.raises(ValueError, match="skip_modules: no linear layer is called 'head'"):
        prepare(Toy(), skip_modules=["head"])
    with pytest.raises(ValueError, match="no valid regular expression"):
        prepare(Toy(), target_modules="(q_proj")
    with pytest.raises(ValueError, match="both target_modules and skip_modules"):
        prepare(Toy(), target_modules=["q_proj"], skip_modules=["q_proj"])


def test_models_without_linear_layers():
    with pytest.raises(ValueError, match="has no linear layers"):
        prepare(nn.Sequential(nn.Embedding(4, 4)))
    with pytest.raises(ValueError, match="besides the skipped and tied ones"):
        prepare(nn.ModuleDict({"lm_head": nn.Linear(4, 4)}))

    class Conv1D(nn.Module):
        pass

    with pytest.raises(ValueError, match="; layers of type Conv1D are not supported"):
        prepare(nn.Sequential(Conv1D()))

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="tied ones; layers of type Scaled are not supported"):
        prepare(nn.ModuleDict({"first": Scaled(4, 4), "lm_head": nn.Linear(4, 4)}))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": -1}, ValueError, "r must be an integer of at least 0"),
        ({"r": 2.0}, ValueError, "r must be an integer"),
        ({"dropout": 1.5}, ValueError, "dropout must lie in"),
        ({"quant_type": "int4"}, ValueError, "quant_type must be one of"),
        ({"blocksize": 100}, ValueError, "blocksize must be one of"),
        ({"layout": "tiles"}, ValueError, "layout must be"),
        ({"double_quant_type": "int8"}, ValueError, "double_quant_type must be"),
        ({"lora_dtype": torch.int32}, TypeError, "lora_dtype must be"),
        ({"skip_modules": "lm_head"}, TypeError, "skip_modules must be a list"),
        ({"target_modules": 3}, TypeError, "target_modules must be a list of names, got 3"),
        ({"target_modules": [0]}, TypeError, "target_modules must be a list of names, got 0 in it"),
        ({"alpha": None}, ValueError, "alpha must be a finite number, got None"),
        ({"weights": 3}, TypeError, "weights must be a path, a mapping"),
        ({"weights": "/does/not/exist"}, FileNotFoundError, "there is no file or folder"),
    ],
)
def test_bad_options_change_nothing(options, error, message):
    model = Toy()
    state = torch.random.get_rng_state()
    with pytest.raises(error, match=message):
        prepare(model, **options)
    assert set(types(model).values()) == {"Linear"}
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("weights", [None, {}])
def test_a_weight_in_fp64_changes_nothing(device, weights):
    model = Toy(device=device)
    model.layers[1].down_proj.double()
    message = r"^layers\.1\.down_proj\.weight must be .*float64; cast it"
    with pytest.raises(TypeError, match=message):
        prepare(model, r=4, weights=weights)
    assert set(types(model).values()) == {"Linear"}
    assert all(p.requires_grad for p in model.parameters())


def test_prepared_twice():
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj has an adapter already"):
        prepare(prepare(Toy(), r=4), r=4)


def test_nan_names_the_layer():
    model = Toy()
    with torch.no_grad():
        model.layers[1].up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.up_proj: weight has 1 NaN or Inf"):
        prepare(model, r=4)


# ---- memory --------------------------------------------------------------------------------------


def test_each_weight_is_freed_before_the_next_is_quantized(monkeypatch):
    model = Toy(layers=4)
    alive = [weakref.ref(m.weight) for n, m in model.named_modules() if n.endswith("_proj")]
    counts = []
    original = Linear4bit.from_linear.__func__

    def counting(cls, linear, **options):
        if linear.in_features > 32:  # the probe of the options is smaller
            counts.append(sum(ref() is not None for ref in alive))
        return original(cls, linear, **options)

    monkeypatch.setattr(Linear4bit, "from_linear", classmethod(counting))
    prepare(model, r=4)
    assert counts == list(range(12, 0, -1))
    assert not any(ref() is not None for ref in alive)


def test_streamed_weights_are_held_one_at_a_time():
    """The stream makes each tensor when it is asked for it; the one before must be gone by then."""
    shapes = {name: t.shape for name, t in Toy(layers=4).state_dict().items()}
    made = []
    held = []

    def stream():
        for name, shape in shapes.items():
            held.append(sum(ref() is not None for ref in made))
            tensor = torch.randn(shape)
            made.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    gc.disable()  # memory must not wait for the collector
    try:
        prepare(Toy(layers=4, device="meta"), r=4, weights=stream())
    finally:
        gc.enable()
    assert max(held) == 0


@pytest.mark.gpu
def test_gpu_memory_peaks_one_layer_above_the_final_size():
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(8))).bfloat16()
    backend = lowbit.dispatch.choose("quantize_4bit", torch.device("cuda"), torch.bfloat16).backend
    if backend == "reference":
        pytest.skip("the reference in plain torch needs large temporaries")
    prepare(nn.Sequential(nn.Linear(64, 64)), r=2, device="cuda")  # tables and workspaces
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prepare(model, r=2, device="cuda")
    final = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    layer = 2048 * 2048 * 2
    assert final < 8 * layer * 0.3
    assert peak < final + 1.3 * layer  # the scales before their own quantization are 3 %


# ---- the meta device and weights -----------------------------------------------------------------


def test_meta_model_stays_meta_without_weights():
    model = prepare(Toy(device="meta"), r=4)
    assert isinstance(model.layers[0].q_proj, QLoRALinear)
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert model(torch.empty(1, 3, dtype=torch.long, device="meta")).shape == (1, 3, 40)
    with pytest.raises(ValueError, match="device has no meaning"):
        prepare(Toy(device="meta"), r=4, device="cpu")


@pytest.fixture(params=["mapping", "iterable", "file", "folder", "shards"])
def source(request, tmp_path):
    """The same weights in every form that prepare reads: (weights, plain model)."""
    model = Toy()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = list(state)
    if request.param == "mapping":
        return state, model
    if request.param == "iterable":
        return iter(state.items()), model
    if request.param != "shards":
        save_file(state, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors" if request.param == "file" else tmp_path, model
    weight_map = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({n: state[n] for n in names if weight_map[n] == shard}, tmp_path / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(tmp_path), model


def test_weights_give_what_the_loaded_model_gives(source):
    weights, model = source
    torch.manual_seed(0)
    expected = prepare(model, r=4)
    torch.manual_seed(0)
    actual = prepare(Toy(device="meta"), r=4, weights=weights)
    assert_same_state(actual, expected)
    assert torch.equal(actual(TOKENS), expected(TOKENS))
    trained = {n for n, p in actual.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in expected.named_parameters() if p.requires_grad}


def test_weights_are_cast_to_the_dtype_of_the_model():
    state = Toy().state_dict()
    expected = Toy()
    expected.load_state_dict(state)
    expected = prepare(expected.bfloat16(), r=0)
    actual = prepare(Toy(device="meta").bfloat16(), r=0, weights=state)
    assert_same_state(actual, expected)
    assert actual.layers[0].q_proj.weight_dtype == torch.bfloat16


def test_tied_head_stays_tied_when_streamed():
    state = Toy(tied=True).state_dict()
    del state["lm_head.weight"]  # as Hugging Face saves it
    model = prepare(Toy(tied=True, device="meta"), r=4, weights=state)
    assert model.lm_head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, state["embed.weight"])


PARTS = [
    "",
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "quant_state.bitsandbytes__nf4",
]


@pytest.mark.parametrize("last", PARTS)
def test_parts_of_a_quantized_weight_come_in_any_order(last):
    def layer(device=None):
        return nn.Sequential(nn.Linear(64, 32, bias=False, device=device))

    expected = prepare(layer(), r=0)
    stored = list(expected.state_dict().items())
    assert len(stored) == len(PARTS)
    stored.sort(key=lambda entry: entry[0].removeprefix("0.weight").removeprefix(".") == last)
    assert_same_state(prepare(layer("meta"), r=0, weights=iter(stored)), expected)


def test_weights_quantized_before_are_taken_as_they_are():
    expected = prepare(Toy(), r=0, blocksize=32)
    model = prepare(Toy(device="meta"), r=4, weights=expected.state_dict())
    assert isinstance(model.layers[0].q_proj, QLoRALinear)
    assert model.layers[0].q_proj.blocksize == 32
    for key, value in expected.state_dict().items():
        assert_bitwise_equal(model.state_dict()[key], value, key)


def test_missing_weights_change_nothing():
    state = Toy().state_dict()
    del state["layers.1.up_proj.weight"], state["embed.weight"]
    model = Toy(device="meta")
    with pytest.raises(CheckpointError, match=r"lack layers\.1\.up_proj\.weight, embed\.weight"):
        prepare(model, r=4, weights=state)
    assert set(types(model).values()) == {"Linear"}
    with pytest.raises(CheckpointError, match=r"layers\.1\.up_proj\.weight.*incomplete"):
        prepare(model, r=4, weights=iter(state.items()))


def test_surplus_weights_are_reported():
    state = {**Toy().state_dict(), "rotary.inv_freq": torch.ones(4)}
    with pytest.warns(UserWarning, match="the model has not: rotary.inv_freq"):
        prepare(Toy(device="meta"), r=4, weights=state)


@pytest.mark.parametrize("name", ["layers.0.q_proj.weight", "layers.0.norm.bias"])
def test_weights_of_another_shape_are_refused(name):
    state = Toy().state_dict()
    state[name] = state[name][:-1]
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        prepare(Toy(device="meta"), r=4, weights=state)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            lambda packed: {"": torch.ones(64, 63)},
            r"must be a floating tensor \[64, 64\], got float32 \[64, 63\] in the weights",
        ),
        (
            lambda packed: {"": torch.ones(64, 64, dtype=torch.int32)},
            r"must be a floating tensor \[64, 64\], got int32 \[64, 64\] in the weights",
        ),
        (
            lambda packed: {part: packed[part] for part in ("", ".quant_map")},
            r"weights have of {key} only {key}, {key}\.quant_map; the model is incomplete",
        ),
    ],
    ids=["shape", "dtype", "parts"],
)
def test_weights_that_came_but_do_not_serve_are_not_called_missing(entries, message):
    key = "layers.0.q_proj.weight"
    packed = {k.removeprefix(key): t for k, t in prepare(Toy(), r=0).state_dict().items()}
    weights = Toy().state_dict() | {key + part: t for part, t in entries(packed).items()}
    with pytest.raises(CheckpointError, match=message.replace("{key}", key.replace(".", r"\."))):
        prepare(Toy(device="meta"), r=4, weights=weights)


def test_cut_off_file_names_the_tensor(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(Toy().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    model = Toy(device="meta")
    with pytest.raises(CheckpointError, match=r"^lm_head\.weight is cut off"):
        prepare(model, r=4, weights=path)
    assert set(types(model).values()) == {"Linear"}
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        prepare(model, r=4, weights=path)


@pytest.mark.parametrize("wrapped", [False, True])
def test_state_dict_with_one_damaged_entry_changes_no_layer(wrapped):
    """torch loads layer by layer; the check of the whole model must come first."""
    model, other = prepare(Toy(), r=4), prepare(Toy(), r=4).state_dict()
    if wrapped:  # its keys in state dicts are those of the plain model
        model.layers[1] = checkpoint_wrapper(model.layers[1])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for key, change in (
        ("layers.1.down_proj.weight.absmax", lambda t: t[:-1]),
        ("layers.1.norm.weight", lambda t: t[:-1]),
    ):
        damaged = {**other, key: change(other[key])}
        with pytest.raises(RuntimeError, match=key.replace(".", r"\.")):
            model.load_state_dict(damaged)
        for name, value in model.state_dict().items():
            assert_bitwise_equal(value, before[name], name)
    model.load_state_dict(other)


# ---- models of transformers ----------------------------------------------------------------------


@pytest.fixture
def llama_config():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    return transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


def test_llama_from_the_meta_device(llama_config, tmp_path):
    """A Hugging Face folder: tied head absent, rotary buffers in no checkpoint."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_config(llama_config).eval()
    plain.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama_config)
    torch.manual_seed(1)
    model = prepare(model, r=4, weights=tmp_path).eval()
    torch.manual_seed(1)
    expected = prepare(plain, r=4)
    assert_same_state(model, expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.lm_head) is nn.Linear
    assert isinstance(model.model.layers[0].self_attn.q_proj, QLoRALinear)
    assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)


def test_weights_of_the_base_model_fit_the_causal_model(llama_config):
    from transformers import AutoModel, AutoModelForCausalLM

    base = AutoModel.from_config(llama_config)  # keys without "model."
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama_config)
    model = prepare(model, r=0, weights=base.state_dict()).eval()
    assert torch.equal(model.model.norm.weight, base.norm.weight)
    assert model(TOKENS).logits.shape == (2, 6, 50)


def test_buffers_that_nobody_can_compute_are_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 32, device="meta")
            self.register_buffer("table", torch.ones(4, device="meta"), persistent=False)

    weights = {"linear.weight": torch.randn(32, 32), "linear.bias": torch.zeros(32)}
    with pytest.raises(ValueError, match="buffers table are on the meta device"):
        prepare(Odd(), r=2, weights=weights)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_llama_trains_with_gradient_checkpointing(llama_config, use_reentrant):
    from transformers import AutoModelForCausalLM

    model = prepare(AutoModelForCausalLM.from_config(llama_config), r=4)
    losses = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train().zero_grad()
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        gradient = model.model.layers[0].mlp.down_proj.lora_B.grad.clone()
        losses.append((loss.detach(), gradient))
    assert torch.equal(losses[0][0], losses[1][0])
    assert torch.equal(losses[0][1], losses[1][1])


def test_bits_per_parameter_after_prepare():
    layer = prepare(Toy(width=512), r=0).layers[0].q_proj
    assert layer.quantized_weight.bits_per_param == pytest.approx(4.127, abs=2e-3)
    assert isinstance(layer.quantized_weight, lowbit.QuantizedWeight)
