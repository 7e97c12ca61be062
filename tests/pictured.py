"""A tiny model that reads pictures, built as SmolVLM-256M-Instruct is: random weights, its vocabulary, template and processor's parts."""

import io

import numpy as np
import tiny
import torch
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

# 49,280 words as SmolVLM-256M has them, so logits and their head are of real size
VOCAB, TILE, PATCH, SCALE = 49_280, 64, 8, 2
# tokens of a tile: (64 / 8 / 2)^2
PARTS = (TILE // PATCH // SCALE) ** 2
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def processor(longest=3 * TILE, tile=TILE, splitting=True, parts=PARTS):
    """A processor of tiles of 64 pixels: up to 3 x 3 of them and the whole picture."""
    tokens = tiny.tokenizer(None)
    tokens.add_special_tokens(
        {
            "additional_special_tokens": [
                *("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"),
                *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)),
            ]
        }
    )
    tokens.eos_token, tokens.bos_token = "<end_of_utterance>", "<|im_start|>"
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": longest}, max_image_size={"longest_edge": tile}, do_image_splitting=splitting
    )
    return Idefics3Processor(images, tokens, image_seq_len=parts, chat_template=TEMPLATE)


def model(made, seed=0, **vision):
    """Random weights, large enough that pictures and words change log-probs."""
    torch.manual_seed(seed)
    tower = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": TILE,
        "patch_size": PATCH,
    } | vision
    text = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": made.tokenizer.bos_token_id,
        "eos_token_id": made.tokenizer.eos_token_id,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    config = Idefics3Config(
        vision_config=tower,
        text_config=text,
        scale_factor=SCALE,
        image_token_id=made.image_token_id,
        tie_word_embeddings=False,
    )
    found = Idefics3ForConditionalGeneration(config).eval()
    found.generation_config.eos_token_id = made.tokenizer.eos_token_id
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if parameter.dim() > 1 and "patch_embedding" not in name:
                parameter.mul_(4)
    return found


def save(folder, **how):
    """A model folder with weights and processor."""
    made = processor(**how)
    model(made).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def picture(path, height, width, seed=0, kind="PNG"):
    """A picture of noise, in a file."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    made = io.BytesIO()
    Image.fromarray(pixels).save(made, kind)
    path.write_bytes(made.getvalue())
    return made.getvalue()
