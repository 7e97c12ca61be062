"""One DPO run with TRL at the settings it is given; prints one JSON line. Started by vs_trl.py in its own process."""

import argparse
import json
import os
import sys
import time

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


class Clock(TrainerCallback):
    """Wall time and loss of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.monotonic())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


class Timed(DPOTrainer):
    """TRL's trainer; only measures how long its reference pass takes."""

    reference_seconds = 0.0

    def _precompute_ref_logps(self, *args, **kwargs):
        began = time.monotonic()
        out = super()._precompute_ref_logps(*args, **kwargs)
        self.reference_seconds = time.monotonic() - began
        return out


def main() -> None:
    """Train and print the figures."""
    parser = argparse.ArgumentParser()
    for name in ("--data", "--model", "--out"):
        parser.add_argument(name, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--per-device", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--precompute", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    args = parser.parse_args()
    rows = [json.loads(line) for line in open(args.data, encoding="utf-8")]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.chat_template = None
    config = DPOConfig(
        output_dir=args.out,
        per_device_train_batch_size=args.per_device,
        gradient_accumulation_steps=args.batch // args.per_device,
        max_steps=args.steps,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=0.1,
        max_length=None,
        bf16=args.bf16,
        gradient_checkpointing=False,
        use_cpu=not args.gpu,
        disable_dropout=True,
        train_sampling_strategy="sequential",
        precompute_ref_log_probs=args.precompute,
        optim="adamw_torch_fused",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    clock = Clock()
    model = AutoModelForCausalLM.from_pretrained(args.model)
    trainer = Timed(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[clock]
    )
    began = time.monotonic()
    trainer.train()
    result = {
        "peak_bytes": torch.cuda.max_memory_allocated() if args.gpu else 0,
        "train_s": clock.seconds[-1] - began,
        "reference_s": trainer.reference_seconds,
        "step_s": [b - a for a, b in zip([began, *clock.seconds], clock.seconds, strict=False)],
        "losses": clock.losses[: args.steps],
    }
    print("RESULT " + json.dumps(result))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
