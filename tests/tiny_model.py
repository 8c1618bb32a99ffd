"""A random two-layer Llama with a tokenizer trained on the spot, for the command-line tests."""

from pathlib import Path

import torch

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = (
    "what is the rank scaling codebook block alpha answer question four bits NF4 LoRA adapter "
    "small matrix weight a an of in one two three zero red green blue stone water"
)


def make_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE):
    """Byte-level BPE over a few words, with an end token and, by default, a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.chat_template = chat_template
    return fast


def make_llama(vocabulary: int, *, seed: int = 0, hidden: int = 64, bias: bool = False):
    """Random Llama for causal language modelling, fp32, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attention_bias=bias,
        tie_word_embeddings=True,
        initializer_range=0.1,  # larger than usual: a loss that two frozen layers can bring down
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    return LlamaForCausalLM(config)


def save_tiny_model(folder: Path, **options) -> Path:
    """Write model and tokenizer as a Hugging Face folder."""
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer), **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
