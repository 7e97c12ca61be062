"""One step of GRPO with favor or TRL, timed by part; prints one JSON line. Started by generation.py in its own process.

Sampling, everything before the update (sampling, reward, log-probs of the samples), and the update are clocked apart.
`--replay` gives TRL the samples of another run instead of its own, so that both must come to the same gradient.
"""

import argparse
import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

# one advantage for all tokens of a sample, ratios clipped at 0.2, mean over tokens, KL to the start weighted by this
BETA, CLIP = 0.04, 0.2


def main() -> None:
    """Take the step and print its figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tool", choices=["favor", "trl"])
    for name in ("--data", "--model", "--reward", "--out"):
        parser.add_argument(name, required=True)
    for name in ("--prompts", "--each", "--new"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--per-device", type=int, default=1, help="samples a pass, of TRL")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--replay", help="a file with samples as token ids")
    parser.add_argument(
        "--continuous", type=json.loads, help="TRL samples by continuous batching, with this configuration"
    )
    args = parser.parse_args()
    print("RESULT " + json.dumps({"favor": favor, "trl": trl}[args.tool](args)), flush=True)


def favor(args: argparse.Namespace) -> dict[str, Any]:
    """`favor ppo`, read back from its metrics; its samples are kept as they are drawn."""
    from favor.cli import main as command
    from favor.train import rollout

    found: dict[str, Any] = {}
    draw = rollout.sampled

    def timed(*given: Any) -> list[tuple[int, ...]]:
        began = time.monotonic()
        found["samples"] = draw(*given)
        found["sampling_s"] = time.monotonic() - began
        return found["samples"]

    rollout.sampled = timed
    run = Path(args.out) / "run"
    settings = {
        "run": run,
        "model.path": args.model,
        "model.dtype": "float32",
        "data.train": args.data,
        "tokens.template": "plain",
        "tokens.special_text": "allow",
        "reward.kind": "callable",
        "reward.path": f"{args.reward}:length",
        "ppo.advantage.kind": "grpo",
        "ppo.kl.kind": "fixed",
        "ppo.kl.coef": BETA,
        "ppo.clip": CLIP,
        "ppo.updates": 1,
        "ppo.samples_per_prompt": args.each,
        "sample.max_new_tokens": args.new,
        "optim.lr": args.lr,
        "optim.schedule": "constant",
        "train.batch_prompts": args.prompts,
        "train.max_steps": 1,
        "train.shuffle": "false",
        "save.every": 0,
    }
    sys.argv = ["favor", "ppo", *(f"{key}={value}" for key, value in settings.items())]
    try:
        command()
    except SystemExit as end:
        if end.code:
            raise
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    (step,) = [record for record in records if record["kind"] == "step"]
    return found | {
        "before_s": step["sampling_s"],
        "update_s": step["seconds"] - step["sampling_s"],
        "grad_norm": step["grad_norm"],
        "reward": step["reward"],
        "tokens": step["unique_tokens"],
    }


def trl(args: argparse.Namespace) -> dict[str, Any]:
    """TRL's GRPOTrainer at the settings it is given."""
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    found: dict[str, Any] = {}

    class Clock(TrainerCallback):
        """When the step begins and ends, and what TRL says of it."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            found["began"] = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found["update_s"] = time.monotonic() - found.pop("began") - found["before_s"]

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            found.update({name: logs[name] for name in ("grad_norm", "reward") if name in logs})

    class Timed(GRPOTrainer):
        """TRL's trainer; only measures its parts."""

        def _generate_single_turn(self, *given: Any, **named: Any) -> Any:
            began = time.monotonic()
            out = super()._generate_single_turn(*given, **named)
            found["sampling_s"] = time.monotonic() - began
            found["samples"] = out[0]
            return out

        def _generate_and_score_completions(self, *given: Any) -> Any:
            began = time.monotonic()
            out = super()._generate_and_score_completions(*given)
            found["before_s"] = time.monotonic() - began
            return out

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.chat_template = None
    score = runpy.run_path(args.reward)["length"]
    samples = json.loads(Path(args.replay).read_text("utf-8")) if args.replay else None
    rows = [json.loads(line) for line in Path(args.data).read_text("utf-8").splitlines()][: args.prompts]
    total = args.prompts * args.each
    config = GRPOConfig(
        output_dir=args.out,
        per_device_train_batch_size=args.per_device,
        gradient_accumulation_steps=total // args.per_device,
        num_generations=args.each,
        max_completion_length=args.new,
        max_steps=1,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=BETA,
        epsilon=CLIP,
        loss_type="dapo",
        temperature=1.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        disable_dropout=True,
        shuffle_dataset=False,
        use_transformers_continuous_batching=args.continuous is not None,
        transformers_continuous_batching_config=args.continuous,
        optim="adamw_torch_fused",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )

    def replayed(prompts: list[str], trainer: Any) -> dict[str, Any]:
        return {
            "prompt_ids": trainer.processing_class(text=prompts)["input_ids"],
            "completion_ids": samples,
            "logprobs": None,
        }

    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(args.model),
        args=config,
        reward_funcs=lambda prompts, completions, **_: score(prompts, completions),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
        rollout_func=replayed if samples else None,
    )
    trainer.train()
    return {"sampling_s": 0.0, "samples": samples, "tokens": 0} | found


if __name__ == "__main__":
    main()
