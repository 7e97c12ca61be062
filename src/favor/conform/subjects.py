"""The models that trainers are tried on: a Llama of two layers whose logits are as large as a real model's, six tokenizers.

In: a folder. Out: model folders as transformers saves them. Next: oracle.py.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# one token each, with a blank before it or without
_ALL = "good bad warm dull film story ending never always stops begins somehow quite rather funny slow bright long"
WORDS = _ALL.split()
_PAD, _BEGIN, _END, _TURN = "<pad>", "<s>", "<|im_end|>", "<|im_start|>"
_VOCABULARY, _WIDTH = 480, 32
# a turn of ChatML; the line break stands before a turn, so nothing follows the last end token
_CHAT = (
    "{% for m in messages %}{{ ('' if loop.first else '\n') + '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)
# as Qwen and others write it: a line break behind every end token
_BROKEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SUBJECTS = ("chat", "line_break", "plain", "begin", "pad_is_end", "dropout")


def make_subjects(folder: Path) -> None:
    """Save every subject of SUBJECTS into the folder; the weights are the same in all."""
    model = _model()
    for name in SUBJECTS:
        model.config.attention_dropout = 0.1 if name == "dropout" else 0.0
        tokenizer = _tokenizer(begins=name == "begin")
        tokenizer.chat_template = {"plain": None, "line_break": _BROKEN, "begin": "{{ '<s>' }}" + _CHAT}.get(
            name, _CHAT
        )
        if name == "pad_is_end":
            tokenizer.pad_token = _END
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _model() -> LlamaForCausalLM:
    """Grouped heads, no biases, an untied head; logits have a standard deviation of 3.5, as those of trained models."""
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(20261129)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                size = 1.0 if "embed" in name else (3.5 if "head" in name else 1.3) / parameter.shape[1] ** 0.5
                nn.init.normal_(parameter, std=size, generator=generator)
    return model


def _tokenizer(*, begins: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE: <pad> 0, <s> 1, <|im_end|> 2, <|im_start|> 3, bytes, merges. begins: it writes <s> before a text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_PAD, _BEGIN, _END, _TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(
        [f"{word}\n {word}" for word in WORDS] * 3 + ["user\nassistant\nsystem\nthe film is"], trainer
    )
    if begins:
        raw.post_processor = TemplateProcessing(single=f"{_BEGIN} $A", special_tokens=[(_BEGIN, 1)])
    named = {"pad_token": _PAD, "bos_token": _BEGIN, "eos_token": _END, "additional_special_tokens": [_TURN]}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **named)
