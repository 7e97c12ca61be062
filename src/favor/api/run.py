"""A run folder in Python: its steps as a table, its held-out figures, its model, its page.

In: the path of a run of `favor train`, `sft` or `reward`. Out: Run. Next: calls.py.
"""

import html
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from favor.config import read
from favor.errors import CheckpointError
from favor.model.load import ModelConfig, load_parts, load_tokenizer
from favor.report.table import figure_rows
from favor.run import RunFolder, read_json, read_jsonl

if TYPE_CHECKING:
    import pandas

# of a step, what the table in a notebook shows
_SHOWN = ("loss", "accuracy", "margin", "gap", "kl")


@dataclass(frozen=True)
class Run:
    """A run of `favor.train`, `favor.sft` or `favor.reward`, finished or not; everything is read from its folder when asked for."""

    path: Path

    @property
    def folder(self) -> RunFolder:
        """The names of all that lies in the folder."""
        return RunFolder(self.path)

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved recipe, config.toml, as nested dicts."""
        return read(self.folder.config)

    @property
    def metrics(self) -> "pandas.DataFrame":
        """A row for each optimizer step; columns and units are those of docs/metrics.md."""
        import pandas

        return pandas.DataFrame(self._records("step"))

    @property
    def events(self) -> "pandas.DataFrame":
        """What was worth saying during the run: step, name and message."""
        import pandas

        return pandas.DataFrame(self._records("event"))

    @property
    def figures(self) -> dict[str, Any]:
        """Held-out figures, those of eval.json; computed and kept there by `favor eval` where there are none yet.

        Raises ConfigError when the run has no held-out data, CheckpointError when it is not finished.
        """
        if not self.folder.evaluation.exists():
            # not quiet: it takes minutes
            self.evaluate()
        return read_json(self.folder.evaluation)

    @cached_property
    def model(self) -> Any:
        """The trained model as transformers loads it, float32, on the CPU, adapters folded in; loaded once.

        Raises CheckpointError when the run is not finished, or its model is damaged.
        """
        scalar = "bradley_terry" in self.settings
        more: dict[str, Any] = {"num_labels": 1} if scalar else {}
        loader = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
        model, _, found = load_parts(loader, self._at(), **more)
        found.refuse(str(self.folder.model))
        return model.eval()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises as `model`."""
        return load_tokenizer(self._at())

    def evaluate(self, **settings: Any) -> dict[str, Any]:
        """`favor.evaluate` of this run."""
        from favor.api.calls import evaluate

        return evaluate(self, **settings)

    def sample(self, prompts: Any, **settings: Any) -> list[dict[str, Any]]:
        """`favor.sample` from the trained model."""
        from favor.api.calls import sample

        return sample(self, prompts, **settings)

    def report(self) -> Path:
        """Write the page with curves, samples and figures, as `favor report`; returns its path."""
        from favor.pages import write_report

        return write_report([self.path])

    def _at(self) -> ModelConfig:
        if not self.folder.model.exists():
            raise CheckpointError(f"{self.path}: the run is not finished (no model/); continue it with resume=True")
        return ModelConfig(path=str(self.folder.model))

    def _records(self, kind: str) -> list[dict[str, Any]]:
        path = self.folder.metrics
        found = read_jsonl(path) if path.exists() and path.stat().st_size else []
        return [{k: v for k, v in record.items() if k != "kind"} for record in found if record.get("kind") == kind]

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in _summary(self).items()
        )
        return f"<table>{cells}</table>"


def load_run(path: Path | str) -> Run:
    """Open a run folder. Raises CheckpointError when there is no run in it."""
    run = Run(Path(path))
    if not run.folder.config.exists():
        raise CheckpointError(
            f"{path}: no run here (no config.toml); name a folder that favor train, sft or reward made"
        )
    return run


def _summary(run: Run) -> dict[str, str]:
    """What a notebook shows: nothing is computed for it."""
    steps = run._records("step")  # pyright: ignore[reportPrivateUsage]
    finished = "finished" if run.folder.model.exists() else "not finished"
    found = {"run": str(run.path), "steps": f"{steps[-1]['step'] if steps else 0}, {finished}"}
    for name in _SHOWN:
        if steps and name in steps[-1]:
            found[name] = f"{steps[0].get(name, float('nan')):.4g} → {steps[-1][name]:.4g} (first, last step)"
    return found | _held_out(run)


def _held_out(run: Run) -> dict[str, str]:
    if not run.folder.evaluation.exists():
        return {}
    rows = figure_rows(read_json(run.folder.evaluation))
    return {what: after + (f" (before: {before})" if before else "") for what, after, before in rows}
