"""lowbit.fuse: which modules change, that nothing else does, and that models compute the same."""

import copy
import logging
import pickle

import pytest
import torch
from grouping import WAYS, choose_way
from helpers import assert_bitwise_equal
from torch import nn

import lowbit
from lowbit import adapters, prepare
from lowbit.nn import Linear4bit, QLoRALinear

transformers = pytest.importorskip("transformers", reason="needs transformers")

VOCABULARY, TOKENS = 64, 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}


def _qwen2_5_vl():
    text = {**SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [0],
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "llama gelu": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, hidden_act="gelu_pytorch_tanh", mlp_bias=True)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "qwen2.5-vl": _qwen2_5_vl,
}


def make_model(name="llama", device="cpu", **options):
    """A prepared model whose adapters take part."""
    torch.manual_seed(0)
    model = prepare(MODELS[name]().to(device), **({"r": 4} | options))
    for module in model.modules():
        if isinstance(module, QLoRALinear):
            nn.init.normal_(module.lora_B, std=0.1)
    return model


def tokens(device="cpu"):
    return torch.arange(2 * TOKENS, device=device).view(2, TOKENS) * 7 % (VOCABULARY - 2) + 2


def run(model, device="cpu", **inputs):
    """Logits, and the gradients of a training step by name."""
    model.zero_grad()
    torch.manual_seed(3)
    output = model(input_ids=tokens(device), labels=tokens(device), use_cache=False, **inputs)
    output.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **grads}


def assert_same(actual, expected, tolerance=0.0):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if tolerance == 0.0:
            assert_bitwise_equal(actual[name], value, name)
        else:
            error = (actual[name] - value).norm() / value.norm().clamp(min=1e-12)
            assert error <= tolerance, f"{name}: relative difference {error:.3g}"


def kinds(model):
    return {name: type(module) for name, module in model.named_modules()}


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("name", list(MODELS))
def test_a_fused_model_computes_the_same(device, name, way, monkeypatch):
    """Member by member bit for bit, on a CPU; stacked up to the order of additions."""
    choose_way(monkeypatch, way)
    model = make_model(name, device)
    keys, expected, before = list(model.state_dict()), run(model, device), kinds(model)
    report = lowbit.fuse(model)
    text = [n for n in report.mlp if "visual" not in n]
    assert (len(report.attention), len(text), report.skipped) == (2, 2, {})
    assert len([n for n in report.norms if "visual" not in n]) == 5
    assert list(model.state_dict()) == keys
    exact = way == "member by member" and device.type == "cpu"
    assert_same(run(model, device), expected, 0.0 if exact else 1e-4)
    fused = [*report.attention, *report.mlp, *report.norms, *report.pieces]
    assert lowbit.unfuse(model) == len(fused) == len(set(fused))
    assert kinds(model) == before


def test_the_vision_tower_of_qwen2_5_vl_is_fused_where_it_matches():
    model = make_model("qwen2.5-vl")
    report = lowbit.fuse(model)
    assert [name for name in report.mlp if "visual" in name] == ["model.visual.blocks.0.mlp"]
    assert report.pieces == ["model.visual.blocks.0.attn"]
    assert not any("visual" in name for name in (*report.attention, *report.skipped))


def test_dropout_draws_the_masks_of_the_separate_layers():
    model = make_model(dropout=0.3)
    model.train()
    expected = run(model)
    lowbit.fuse(model)
    assert_same(run(model), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, device):
    model = make_model(dropout=0.2, device=device)
    model.train()
    expected = run(model, device)
    lowbit.fuse(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same(run(model, device), expected, 1e-4 if device.type == "cuda" else 0.0)


def test_autocast_and_16_bit(device):
    model = make_model(device=device).to(torch.bfloat16)
    reference = run(copy.deepcopy(model).float(), device)
    plain = run(model, device)
    lowbit.fuse(model)
    fused = run(model, device)
    for name, value in reference.items():
        plain_error, fused_error = ((r[name] - value).norm() for r in (plain, fused))
        assert fused_error <= 1.5 * plain_error + 1e-3 * value.norm(), name
    model = make_model(device=device)
    results = []
    for _ in range(2):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            results.append(run(model, device))
        lowbit.fuse(model)
    # Separate layers cast x each for itself and add their dx in fp32; the group casts it once.
    assert_same(results[1], results[0], 0.05)


def test_compiles_without_graph_breaks():
    torch.compiler.reset()
    model = make_model()
    lowbit.fuse(model)
    expected = run(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    output = compiled(input_ids=tokens(), labels=tokens(), use_cache=False)
    output.loss.backward()
    assert_bitwise_equal(output.logits.detach(), expected["logits"], "logits")
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same(grads, {n: g for n, g in expected.items() if n != "logits"}, 1e-6)


def test_generation_and_what_transformers_reads_from_attention():
    model = make_model().eval()
    model.set_attn_implementation("eager")

    def results():
        torch.manual_seed(0)
        output = model(input_ids=tokens(), output_attentions=True, output_hidden_states=True)
        return [
            model.generate(tokens()[:, :5], max_new_tokens=6, do_sample=False),
            *output.attentions,
            *output.hidden_states,
        ]

    expected = results()
    lowbit.fuse(model)
    actual = results()
    assert len(actual) == len(expected) == 1 + 2 + 3
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


# ---- what happens to adapters and files ----------------------------------------------------------


def test_adapters_are_switched_merged_and_dropped_as_before():
    fused, plain = make_model(), make_model()
    lowbit.fuse(fused)
    x = {"input_ids": tokens()}

    def same():
        assert torch.equal(fused(**x).logits, plain(**x).logits)

    with torch.no_grad():
        same()
        for model in (fused, plain):
            adapters.disable_adapter(model)
        same()
        for model in (fused, plain):
            adapters.enable_adapter(model)
            adapters.merge_adapter(model)
        same()
        for model in (fused, plain):
            adapters.unmerge_adapter(model)
        same()
        for model in (fused, plain):
            adapters.drop_adapter(model)
        same()
        for model in (fused, plain):
            adapters.merge(model)  # dense layers now: the modules' own forward runs
        same()
    assert type(fused.model.layers[0].mlp.down_proj) is nn.Linear


@pytest.mark.parametrize("fused_first", [True, False])
def test_adapter_files_between_fused_and_plain_models(tmp_path, fused_first):
    trained, fresh = make_model(), make_model(r=8)
    lowbit.fuse(trained if fused_first else fresh)
    adapters.save_adapter(trained, tmp_path)
    adapters.load_adapter(fresh, tmp_path)  # replaces the layers in a fused module
    assert_same(run(fresh), run(trained))


@pytest.mark.parametrize("fused_first", [True, False])
def test_whole_models_between_fused_and_plain(tmp_path, fused_first):
    model, fresh = make_model(), MODELS["llama"]()
    if fused_first:
        lowbit.fuse(model)
    lowbit.save(model, tmp_path)
    lowbit.load(fresh, tmp_path)
    if not fused_first:
        lowbit.fuse(fresh)
    assert_same(run(fresh), run(model))
    fresh.load_state_dict(model.state_dict())


def test_copies_and_pickles_stay_fused():
    model = make_model()
    lowbit.fuse(model)
    expected = run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kinds(other) == kinds(model)
        assert other.model.layers[0].self_attn.q_proj is not model.model.layers[0].self_attn.q_proj
        assert_same(run(other), expected)
        assert lowbit.unfuse(other) == 9


def test_replicas_use_their_own_layers():
    """What nn.DataParallel does to a module: a shallow copy with other layers in it."""
    mlp = make_model().model.layers[0].mlp
    lowbit.fuse(mlp)
    replica = mlp._replicate_for_data_parallel()
    replica.down_proj = copy.deepcopy(mlp.down_proj)
    nn.init.zeros_(replica.down_proj.lora_B)
    x = torch.randn(3, 64)
    expected = mlp.unfused.forward(replica, x)
    assert torch.equal(replica(x), expected)
    assert not torch.equal(replica(x), mlp(x))


# ---- which modules change ------------------------------------------------------------------------


def test_prepare_fuses_and_says_so(caplog):
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO, logger="lowbit"):
        model = prepare(MODELS["llama"](), r=4, target_modules=["q_proj", "v_proj"], fuse=True)
    assert "fused 2 attention modules, 2 MLPs and 5 norms" in caplog.text
    assert type(model.model.layers[0].self_attn.k_proj) is Linear4bit  # needs no adapter
    assert lowbit.unfuse(model) == 9
    expected = run(model)
    lowbit.fuse(model)
    assert_same(run(model), expected)


def test_meta_models_are_fused_before_they_have_weights(tmp_path):
    lowbit.save(make_model(), tmp_path)
    with torch.device("meta"):
        model = MODELS["llama"]()
    model = prepare(model, r=4, fuse=True)
    lowbit.load(model, tmp_path)
    assert lowbit.unfuse(copy.deepcopy(model)) == 9
    assert_same(run(model), run(make_model()))


def test_fusing_twice_changes_nothing():
    model = make_model()
    first, again = lowbit.fuse(model), lowbit.fuse(model)
    assert again.attention == again.mlp == again.norms == []
    assert list(again.skipped.values()) == ["it is fused already"] * 9
    assert "; skipped model.layers.0.self_attn (it is fused already) and 8 more" in str(again)
    assert len(first.attention) == len(first.mlp) == 2
    assert lowbit.unfuse(model) == 9
