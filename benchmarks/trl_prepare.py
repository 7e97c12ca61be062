"""TRL's preparation of a preference file, as DPOTrainer does it, timed; prints one JSON line. Started by prepare.py."""

import argparse
import json
import os
import sys
import tempfile
import time
from types import SimpleNamespace

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import DPOTrainer


def main() -> None:
    """Load and prepare the file as the trainer would, without a model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--processes", type=int, default=0, help="dataset_num_proc; 0 is TRL's default")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # the one attribute of the trainer that _prepare_dataset reads, and the one option
    trainer = SimpleNamespace(_tokenizer=tokenizer, _is_vision_dataset=False)
    options = SimpleNamespace(dataset_num_proc=args.processes or None, max_length=1024, truncation_mode="keep_start")
    with tempfile.TemporaryDirectory() as cache:
        began = time.monotonic()
        dataset = load_dataset("json", data_files=args.data, split="train", cache_dir=cache)
        loaded = time.monotonic()
        prepared = DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, options, "train")
        done = time.monotonic()
        tokens = sum(len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in prepared)
    figures = {"rows": len(prepared), "load_s": loaded - began, "prepare_s": done - loaded, "tokens": tokens}
    print("RESULT " + json.dumps(figures))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
