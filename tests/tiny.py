"""Tiny random models and tokenizers of every family the engine claims."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 320
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA = _SIZES | {"num_key_value_heads": 2}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GQA, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_GQA)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GQA, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_GQA, head_dim=8)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**_GQA, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2)
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZES)),
}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# ChatML that writes tools, calls, and reasoning where it was said, and ends that before it begins where a row says so
AGENTS = (
    "{% set off = '<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking else '' %}"
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m.reasoning_content %}"
    "{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% elif m['role'] == 'assistant' %}{{ off }}{% endif %}"
    "{{ m['content'] or '' }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + off }}{% endif %}"
)
_CORPUS = [
    "What is the capital of France? Paris is the capital of France.",
    "Write a one-line review of the film. A warm, funny and humane film that never stops.",
    "\n\nHuman: hello there\n\nAssistant: hello, how can I help you today?",
    "user assistant system good bad better worse yes no maybe because",
]


def model(family="llama", seed=0):
    """A tiny random model whose weights are large enough for log-probs to differ."""
    torch.manual_seed(seed)
    made = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return made


def tokenizer(template=CHATML, bos=False):
    """A byte-level BPE tokenizer with <pad> 0, <s> 1, <|im_end|> 2 (end), <|im_start|> 3."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<|im_end|>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(_CORPUS, trainer)
    if bos:
        from tokenizers.processors import TemplateProcessing

        raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    made.chat_template = template
    return made


def template_of(fixture):
    """The chat template that an example of a published format (data/formats) wants."""
    return AGENTS if fixture.endswith(("_tools", "_thinking")) else CHATML


def save(folder, family="llama", template=CHATML):
    """A model folder with weights and tokenizer."""
    model(family).save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return folder


def word_tokenizer(words):
    """One token a word: <pad> 0, <s> 1, </s> 2 (end), then the words; for models whose whole distribution is looked at."""
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save_words(folder, words, seed=0):
    """A small Llama over a handful of words."""
    torch.manual_seed(seed)
    config = LlamaConfig(**(_GQA | {"vocab_size": 3 + len(words)}), tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer(words).save_pretrained(folder)
    return folder
