"""TRL's DPOTrainer.

In: what `favor conform` asks. Out: the folder of the trained model and its losses.
"""

from typing import Any

LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def train(model: str, rows: list[dict[str, Any]], out: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Plain float32, rows in their order, a log line for every step."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            if state.global_step == settings.get("stop_after"):
                control.should_save = control.should_training_stop = True

    config = DPOConfig(
        output_dir=out,
        per_device_train_batch_size=settings["batch"] // settings["accumulation"] // settings["ranks"],
        gradient_accumulation_steps=settings["accumulation"],
        num_train_epochs=settings["epochs"],
        learning_rate=settings["lr"],
        lr_scheduler_type="linear",
        max_grad_norm=settings["clip"],
        beta=settings["beta"],
        max_length=settings["max_length"],
        seed=settings["seed"],
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    trainer = DPOTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), callbacks=[Stop()])
    trainer.train(resume_from_checkpoint=settings.get("resume"))
    trainer.save_model(out)
    return {"model": out, "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log]}
