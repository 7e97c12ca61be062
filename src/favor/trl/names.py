"""TRL's names and favor's: of DPOConfig (TRL 1.16 and earlier), of transformers' TrainingArguments, of TRL's command line.

In: a name of TRL. Out: favor's key, or a sentence where there is no equal. Next: recipe.py.
"""

from collections.abc import Mapping

# TRL's name -> favor's key for the same value
KEYS: Mapping[str, str] = {
    "learning_rate": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "adam_epsilon": "optim.eps",
    "max_grad_norm": "optim.clip",
    "warmup_steps": "optim.warmup",
    "warmup_ratio": "optim.warmup",
    "lr_scheduler_type": "optim.schedule",
    "optim": "optim.kind",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "seed": "seed",
    "max_length": "tokens.max_tokens",
    "truncation_mode": "tokens.truncation",
    "beta": "loss.beta",
    "loss_type": "loss.kind",
    "label_smoothing": "loss.label_smoothing",
    "discopop_tau": "loss.discopop_tau",
    "ld_alpha": "loss.ld_alpha",
    "use_weighting": "loss.wpo",
    "f_divergence_type": "loss.divergence.kind",
    "simpo_gamma": "loss.gamma",
    "ref_model_sync_steps": "reference.sync.every",
    "ref_model_mixup_alpha": "reference.sync.weight",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "trust_remote_code": "model.trust_remote_code",
    "model_name_or_path": "model.path",
    "model_revision": "model.revision",
    "lora_r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "lora_target_modules": "model.lora.targets",
    "output_dir": "run",
    "save_steps": "save.every",
    "save_total_limit": "save.keep",
    "eval_steps": "watch.eval.every",
    "dataset_name": "data.train",
    "dataset_train_split": "data.split",
    "dataset_test_split": "data.eval_split",
    "max_new_tokens": "sample.max_new_tokens",
}
# TRL's name -> what to say: several settings make one, or there is no equal
SAID: Mapping[str, str] = {
    "per_device_train_batch_size": "TRL's per_device_train_batch_size x gradient_accumulation_steps x devices is favor's "
    "train.batch_prompts, and train.max_tokens_per_pack bounds the memory",
    "gradient_accumulation_steps": "favor accumulates by itself: train.batch_prompts is the whole batch "
    "(TRL's per_device_train_batch_size x gradient_accumulation_steps x devices)",
    "batch_size": "the whole optimizer batch is favor's train.batch_prompts",
    "per_device_eval_batch_size": "held-out data is measured within train.max_tokens_per_pack",
    "precompute_ref_batch_size": "the reference is computed within train.max_tokens_per_pack",
    "precompute_ref_log_probs": 'favor does that by itself: reference.mode = "stored"',
    "max_prompt_length": "favor limits prompt and response together: tokens.max_tokens, tokens.truncation",
    "max_completion_length": "favor limits prompt and response together: tokens.max_tokens",
    "adam_beta1": "both betas of Adam are favor's optim.betas = [0.9, 0.999]",
    "adam_beta2": "both betas of Adam are favor's optim.betas = [0.9, 0.999]",
    "bf16": "TRL's bf16 = True is favor's model.dtype = \"bfloat16\"",
    "fp16": "favor computes in float32 or bfloat16: model.dtype",
    "loss_weights": 'several losses are favor\'s loss.kind = "sum", loss.terms = [{kind = ..., weight = ...}, ...]',
    "rpo_alpha": 'it is favor\'s loss.kind = "sum" with the terms dpo and sft',
    "f_alpha_divergence_coef": "TRL's coefficient is 1 - alpha of favor's loss.divergence = {kind = \"alpha\", alpha = ...}",
    "sync_ref_model": 'it is favor\'s reference.mode = "live" with reference.sync.every and reference.sync.weight',
    "reference_free": "losses without a reference are kinds of their own: loss.kind = simpo, cpo or orpo",
    "use_peft": "adapters are trained when a key of [model.lora] is set: model.lora.rank = 16",
    "peft_config": "adapters are favor's [model.lora]: model.lora.rank, alpha, targets",
    "lora_dropout": "favor trains without dropout, so that log-probs are exact",
    "disable_dropout": "favor trains without dropout, so that log-probs are exact",
    "ref_model": "the reference is the model that training starts from; to measure against another: favor eval reference=FOLDER",
    "processing_class": "a folder brings its tokenizer; in Python: tokenizer=",
    "train_dataset": "it is data.train; in Python the second argument, rows",
    "eval_dataset": "it is data.eval; in Python eval=",
    "args": "settings are favor's own keys; `favor from-trl FILE` turns a DPOConfig into a recipe",
    "padding_free": "prompt trees hold no padding",
    "pad_to_multiple_of": "prompt trees hold no padding",
    "dataset_num_proc": "the tokenizer uses all cores by itself",
    "eval_strategy": "held-out figures come at the start, at the end and every watch.eval.every steps",
    "eval_on_start": "favor does that by itself",
    "save_strategy": "checkpoints come every save.every steps",
    "save_only_model": "the finished model holds no optimizer; checkpoints do",
    "resume_from_checkpoint": "it is favor's resume = true, with the same run",
    "logging_steps": "every step is in metrics.jsonl of the run",
    "logging_strategy": "every step is in metrics.jsonl of the run",
    "logging_dir": "every step is in metrics.jsonl of the run",
    "logging_first_step": "every step is in metrics.jsonl of the run",
    "report_to": "every step is in metrics.jsonl of the run, and favor report draws it",
    "run_name": "a run is called by its folder: run",
    "model_init_kwargs": "what of a model can be set is section [model]: revision, dtype, trust_remote_code",
    "dtype": "products are model.dtype, weights float32; those that do not train may be kept in bfloat16: model.weights",
    "torch_dtype": "products are model.dtype, weights float32; those that do not train may be kept in bfloat16: model.weights",
    "attn_implementation": "favor computes attention over prompt trees itself, where that is exact",
    "generate_during_eval": "favor eval samples from policy and reference",
    "load_in_4bit": "LoRA's base is kept in 4 bits by model.weights=nf4",
    "load_in_8bit": "favor trains float weights; adapters (model.lora.rank) need the least memory",
    "deepspeed": "torchrun splits the batch over processes, ranks.shard=full the model too (docs/scale.md)",
    "fsdp": "torchrun splits the batch over processes, ranks.shard=full the model too (docs/scale.md)",
}
# TRL's loss_type -> favor's kind, and what of [loss] goes with it
LOSSES: Mapping[str, tuple[str, Mapping[str, bool]]] = {
    "sigmoid": ("dpo", {}),
    "sigmoid_norm": ("dpo", {"length_normalized": True}),
    "ipo": ("ipo", {"length_normalized": True}),
    "exo_pair": ("exo", {}),
    "nca_pair": ("nca", {}),
    "bco_pair": ("bco", {}),
    "aot_pair": ("aot", {}),
    "kto_pair": ("kto", {}),
    **{
        kind: (kind, {})
        for kind in ("hinge", "robust", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft")
    },
}


def called(name: str) -> str | None:
    """What to say of a name of TRL; None for a name that it does not have either."""
    if name in KEYS:
        return f"TRL's {name} is favor's {KEYS[name]}"
    said = SAID.get(name)
    return said if said is None or said.startswith("TRL's ") else f"TRL's {name}: {said}"


def loss_called(name: str) -> str | None:
    """What to say of a loss_type of TRL that favor has under another name."""
    kind, settings = LOSSES.get(name, (name, {}))
    also = "".join(f" with loss.{key} = {str(value).lower()}" for key, value in settings.items())
    return None if kind == name else f"TRL's {name} is favor's {kind}{also}"
