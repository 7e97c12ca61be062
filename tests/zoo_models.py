"""Every causal-LM family that the installed transformers lists, tiny, with weights and logits as large as real ones.

A random tiny model has logits near 0, where a soft-cap, a scale or a multiplier does not show; so weights are drawn anew
and the head is scaled until the logits spread over tens of nats.
"""

import contextlib
import dataclasses
import re

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

VOCAB = 320
# token ids of the trees: below the ids that multimodal models keep for images and sounds
WORDS = (4, 300)
FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
REWARDS = frozenset(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
ENCODERS = [
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
]
# families that are tried with their head tied to the embedding and apart from it
TIED = [
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "granite",
    "cohere",
    "gpt2",
    "gpt_neox",
    "bloom",
    "opt",
    "mistral",
    "phi3",
    "olmo2",
    "deepseek_v3",
    "minicpm3",
    "falcon",
    "mamba",
    "jamba",
]
# size -> the names that configs give it
_SIZES = {
    VOCAB: "vocab_size n_token decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size pronunciation_vocab_size "
    "shape_vocab_size encoder_hash_byte_group_vocab ngram_vocab_size_base",
    32: "hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim lru_width pronunciation_embed_dim "
    "input_embedding_size shape_embed_dim ple_embed_dim attention_hidden_size",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner feed_forward_size ffn_hidden_size "
    "intermediate_size_mlp dense_intermediate_size output_embedding_size",
    16: "moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size router_hidden_size hidden_size_per_layer_input "
    "kv_lora_rank q_lora_rank o_lora_rank time_step_rank mamba_dt_rank adapter_rank",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers "
    "num_blocks num_layers_per_stack num_experts_per_tok moe_topk moe_k num_experts_per_token num_key_value_heads "
    "num_kv_heads swa_num_key_value_heads linear_num_key_heads",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_value_heads linear_num_heads "
    "index_n_heads qk_rope_head_dim rotary_dim d_rel hc_lowrank laurel_rank gated_norm_rank num_experts num_local_experts "
    "n_routed_experts moe_num_experts",
    8: "head_dim kv_channels d_head dim_head attention_head_size swa_head_dim v_head_dim qk_nope_head_dim linear_head_dim "
    "linear_key_head_dim linear_value_head_dim index_head_dim mamba_d_state state_size ssm_state_size mamba_n_heads "
    "mamba_num_heads mamba_d_head mamba_head_dim mamba_headdim n_mamba_heads chunk_size mamba_chunk_size block_size",
    512: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length max_target_positions "
    "rel_extent position_bias_max_distance",
    64: "mamba_d_ssm max_source_positions",
    1: "n_group num_expert_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts zero_expert_num "
    "n_groups mamba_n_groups mamba_ngroups num_mem_blocks o_groups",
    256: "sliding_window attention_chunk_size sliding_window_size window_size attention_window_size local_attention floor_scale "
    "keep_window_size log_scaling_n_floor index_topk",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
WINDOWS = (
    "sliding_window",
    "attention_chunk_size",
    "sliding_window_size",
    "window_size",
    "attention_window_size",
    "local_attention",
)
_LAYERS = ("layer_types", "layers_block_type", "mlp_layer_types")
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_GRANITE = {"embedding_multiplier": 6.0, "logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.5}
_QSA = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 256,
    "indexer_compress_ratio": 4,
}
# what the general rule does not know of a family
SPECIAL = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "cohere2_moe": {"logit_scale": 0.25},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "falcon_h1": {
        "lm_head_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "mlp_multipliers": [0.7, 0.6],
        "key_multiplier": 0.5,
        "attention_out_multiplier": 0.8,
        "ssm_in_multiplier": 0.7,
    },
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 12},
    "gemma2": {"attn_logit_softcapping": 3.0},
    "vaultgemma": {"attn_logit_softcapping": 3.0},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 48, "activation_sparsity_pattern": [0.5, 0.0]},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": _GRANITE,
    "granite_swa": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoe_swa": _GRANITE,
    "granitemoehybrid": _GRANITE | {"layer_types": ["linear_attention", "full_attention"]},
    "granitemoeshared": _GRANITE,
    "hyperclovax": _GRANITE,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 8, "num_heads": 8},
    "minicpm3": {"scale_emb": 4, "dim_model_base": 8},
    "longcat_flash": {"head_dim": 4},
    "opt": {"word_embed_proj_dim": 16},
    "qwen4_exp": _QSA,
    "qwen4_exp_text": _QSA,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "num_buckets": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
}


class NotBuiltError(Exception):
    """Why a family has no tiny model here."""


def config(family, **over):
    """A tiny config of a family with every kind of layer it has; `over` goes to the language model's own config.

    Raises NotBuiltError with the reason.
    """
    with _reasons():
        return _shrink(CONFIG_MAPPING[family], {**SPECIAL.get(family, {}), **over}, top=True)


def text_config(family):
    """The language model's part of the tiny config. Raises NotBuiltError with the reason."""
    made = config(family)
    with _reasons():
        return made.get_text_config()


@contextlib.contextmanager
def _reasons():
    try:
        yield
    except NotBuiltError:
        raise
    except Exception as error:  # noqa: BLE001 (anything that stops a tiny model is its reason)
        raise NotBuiltError(f"{type(error).__name__}: {' '.join(str(error).split()):.160}") from None


def _shrink(cls, over, top=False):
    fields = {field.name for field in dataclasses.fields(cls)} - set(cls.attribute_map)
    known = {name: size for name, size in SIZES.items() if name in fields}
    default = None
    with contextlib.suppress(Exception):
        default = cls()
    if "kv_lora_rank" in fields:
        known["num_key_value_heads"] = 4
    kinds = {name: list(dict.fromkeys(vars(default).get(name) or ())) for name in _LAYERS if default and name in fields}
    kinds = {name: found for name, found in kinds.items() if found and all(isinstance(kind, str) for kind in found)}
    layers = max([2, *map(len, kinds.values())])
    known |= {name: [found[i % len(found)] for i in range(layers)] for name, found in kinds.items()}
    known |= {name: layers for name in _COUNTS if name in fields}
    known |= {
        name: 0.0 for name in ("dropout", "hidden_dropout_prob", "attention_probs_dropout_prob") if name in fields
    }
    known |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    known |= _inner(cls, default, fields, over)
    rest = {k: v for k, v in over.items() if not ("text_config" in known and k not in fields)}
    return cls(**{name: value for name, value in (known | rest).items() if top or name in fields})


def _inner(cls, default, fields, over):
    """The parts of a multimodal config, tiny too."""
    made = {}
    for name, part in (cls.sub_configs or {}).items():
        if name not in fields or name in over:
            continue
        kind = type(vars(default).get(name)) if part.__name__ == "AutoConfig" and default else part
        if dataclasses.is_dataclass(kind):
            made[name] = _shrink(kind, over if name == "text_config" else {})
    return made


def build(family, seed=0, scores=False, **over):
    """The language model, or the reward model (`scores`), in eval mode. Raises NotBuiltError with the reason."""
    made = config(family, **over)
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    if scores:
        made.num_labels = 1
    with _reasons():
        with torch.device("meta"):
            count = sum(p.numel() for p in kind.from_config(made).parameters())
        if count > 4e6:
            raise NotBuiltError(f"{count:.0f} parameters when as small as it gets here")
        torch.manual_seed(seed)
        model = kind.from_config(made).eval()
        enlarge(model)
    return model


_SCORES = re.compile(r"q_proj|k_proj|q_b_proj|kv_b_proj|query|\bkey\b|qkv|c_attn|Wqkv|q_lin|k_lin|in_proj|q_attn")


def enlarge(model):
    """Draw matrices at the width's scale (queries and keys larger), jitter what is constant, scale the head by its logits."""
    generator = torch.Generator().manual_seed(5)
    heads = {
        id(module.weight)
        for module in (model.get_output_embeddings(), model.get_input_embeddings())
        if module is not None
    }
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = p.std() if p.numel() > 1 else torch.zeros(())
            if p.dim() > 1 and "weight" in name and "conv" not in name and id(p) not in heads:
                gain = 1.6 if _SCORES.search(name) else 0.8
                p.normal_(0.0, gain * p.shape[-1] ** -0.5, generator=generator)
            elif p.dim() == 3 and "conv" not in name:
                p.normal_(0.0, 0.2, generator=generator)
            elif id(p) in heads:
                # small, so that what the layers add to a token counts beside the token itself
                p.normal_(0.0, 0.3, generator=generator)
            elif spread == 0:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        if not scores_text(model):
            _scale_head(model, generator)
        else:
            model.score.weight.mul_(5.0)


def _scale_head(model, generator):
    """Spread the logits: through the last norm before a tied head, else through the head itself."""
    ids = torch.randint(*WORDS, (1, 40), generator=generator)
    head = model.get_output_embeddings() or model.get_input_embeddings()
    seen, raw = [], []
    handles = [
        module.register_forward_hook(lambda m, i, o: seen.append(m))
        for module in model.modules()
        if not list(module.children()) and [p.dim() for p in module.parameters()] in ([1], [1, 1])
    ]
    handles.append(head.register_forward_hook(lambda m, i, o: raw.append(o.std().item())))
    logits_of(model, ids)
    tied = head is model.get_input_embeddings() or head.weight is model.get_input_embeddings().weight
    scaled = seen[-1].weight if tied and seen else head.weight
    for _ in range(3):
        raw.clear()
        spread = logits_of(model, ids).std().item()
        # a cap holds the logits back: what counts is what comes before it
        if spread > 8 or raw[-1] > 60:
            break
        scaled.mul_(min(max(9.0 / max(spread, 1e-6), 1.5), 1e3))
    for handle in handles:
        handle.remove()


def logits_of(model, ids):
    """Logits of plain transformers, [1, T, V]."""
    return model(input_ids=ids, use_cache=False).logits


def scores_text(model):
    """Whether it is a reward model."""
    return type(model).__name__.endswith("ForSequenceClassification")
