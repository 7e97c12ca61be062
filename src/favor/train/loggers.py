"""watch.logger: the steps and held-out figures of metrics.jsonl, told to TensorBoard, W&B, MLflow or trackio too.

In: a run folder and its records. Out: the same curves in that tool's own files. Nothing leaves this machine unless the
tool's own environment variables say so (docs/chat.md). Next: watch.py.

A resumed run repeats steps that it had told before it stopped, with the same figures: those are not told again.
"""

import contextlib
import io
import os
import secrets
import time
import tomllib
from collections.abc import Callable, Generator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Field

from favor.config import STRICT
from favor.errors import ConfigError
from favor.run import RunFolder, dotted, make_folder, read_jsonl, read_text, write_text

Logger: TypeAlias = Literal["tensorboard", "wandb", "mlflow", "trackio"]
ToLogger: TypeAlias = Annotated[
    Logger | None,
    Field(description="Tell another tool of every step, too; its files stay on this machine unless you say otherwise."),
]
Record: TypeAlias = Mapping[str, object]
# figures by name, and the step that they belong to
Write: TypeAlias = Callable[[Mapping[str, float], int], object]
# what is told: the records' kind -> the group of curves
_GROUPS = {"step": "train", "eval": "eval", "health": "health"}
_PROJECT = "favor"


class LoggedConfig(BaseModel):
    """Section [watch] of commands that measure nothing beside their steps."""

    model_config = STRICT
    logger: ToLogger = None


@contextlib.contextmanager
def following(logger: Logger, folder: RunFolder) -> Generator[Callable[[Record], None]]:
    """A function for every record of a run, whose folder has its recipe; the tool is started by the first step.

    Raises ConfigError, before anything is done, where a package is missing.
    """
    _check(logger)
    known = _told_before(folder)
    with contextlib.ExitStack() as tool:
        write: list[Write] = []

        def tell(record: Record) -> None:
            kind, step = record.get("kind"), record.get("step")
            if kind not in _GROUPS or not isinstance(step, int) or step <= known.get(str(kind), -1):
                return
            if not write:
                settings = dotted(tomllib.loads(read_text(folder.config)))
                write.append(tool.enter_context(_TOOLS[logger](folder.root, settings)))
            write[0](_figures(_GROUPS[str(kind)], record), step)

        yield tell


def _figures(group: str, record: Record) -> dict[str, float]:
    found = {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}
    return {f"{group}/{name}": float(value) for name, value in found.items()}


def _check(logger: Logger) -> None:
    missing = [name for name in _NEEDED[logger] if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"watch.logger = '{logger}' needs {', '.join(missing)}, not installed here; run: pip install "
            f"'favor[{logger}]', or leave watch.logger out"
        )


def _told_before(folder: RunFolder) -> dict[str, int]:
    """Of each kind of record, the last step that a run which is resumed had written."""
    found: dict[str, int] = {}
    for record in read_jsonl(folder.metrics) if folder.metrics.exists() else []:
        kind, step = record.get("kind"), record.get("step")
        if isinstance(kind, str) and isinstance(step, int):
            found[kind] = max(found.get(kind, -1), step)
    return found


def _identity(root: Path, tool: str) -> tuple[str, bool]:
    """The run's name at a tool, kept in the run folder, and whether it was there: a resumed run goes on under it."""
    path = root / tool / "favor-run"
    if path.exists():
        return read_text(path).strip(), True
    make_folder(path.parent)
    name = f"{root.resolve().name}-{secrets.token_hex(4)}"
    write_text(path, name + "\n")
    return name, False


@contextlib.contextmanager
def _tensorboard(root: Path, settings: Mapping[str, Any]) -> Generator[Write]:
    from torch.utils.tensorboard import SummaryWriter

    with contextlib.closing(SummaryWriter(str(root / "tensorboard"))) as writer:
        writer.add_text("settings", "\n".join(f"    {key} = {value}" for key, value in settings.items()))

        def write(figures: Mapping[str, float], step: int) -> None:
            for name, value in figures.items():
                writer.add_scalar(name, value, step)
            # what was told is there if the process is killed
            writer.flush()

        yield write


@contextlib.contextmanager
def _wandb(root: Path, settings: Mapping[str, Any]) -> Generator[Write]:
    # offline, not even its crash reports leave
    mode: Any = os.environ.get("WANDB_MODE", "offline")
    if mode != "online":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # pyright: ignore[reportMissingImports]

    name, _ = _identity(root, "wandb")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", _PROJECT),
        name=root.resolve().name,
        id=name.rpartition("-")[2],
        dir=str(root),
        mode=mode,
        resume="allow",
        config=dict(settings),
        settings=wandb.Settings(console="off", silent=True),
    )
    run.define_metric("*", step_metric="step")

    def write(figures: Mapping[str, float], step: int) -> None:
        run.log({**figures, "step": step})

    failed = True
    try:
        yield write
        failed = False
    finally:
        run.finish(exit_code=int(failed))


@contextlib.contextmanager
def _mlflow(root: Path, settings: Mapping[str, Any]) -> Generator[Write]:
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
    from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

    name, known = _identity(root, "mlflow")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(root / 'mlflow/mlflow.db').resolve()}"
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(_PROJECT)
    place = None if os.environ.get("MLFLOW_TRACKING_URI") else (root / "mlflow/artifacts").resolve().as_uri()
    experiment = found.experiment_id if found else client.create_experiment(_PROJECT, artifact_location=place)
    before = client.search_runs([experiment], f"attributes.run_name = '{name}'") if known else []
    run = (before[0] if before else client.create_run(experiment, run_name=name)).info.run_id
    if before:
        client.update_run(run, status="RUNNING")
    else:
        client.log_batch(run, params=[Param(key, str(value)[:500]) for key, value in settings.items()][:100])

    def write(figures: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run, metrics=[Metric(key, value, now, step) for key, value in figures.items()])

    status = "FAILED"
    try:
        yield write
        status = "FINISHED"
    finally:
        client.set_terminated(run, status)


@contextlib.contextmanager
def _trackio(root: Path, settings: Mapping[str, Any]) -> Generator[Write]:
    import trackio  # pyright: ignore[reportMissingImports]

    name, _ = _identity(root, "trackio")
    # it prints how to open its page; the documentation says it too
    with contextlib.redirect_stdout(io.StringIO()):
        run = trackio.init(
            _PROJECT,
            name,
            resume="allow",
            config=dict(settings),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(figures: Mapping[str, float], step: int) -> None:
        run.log(dict(figures), step=step)

    try:
        yield write
    finally:
        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()


_TOOLS: Mapping[Logger, Callable[[Path, Mapping[str, Any]], contextlib.AbstractContextManager[Write]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
_NEEDED: Mapping[Logger, tuple[str, ...]] = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "trackio": ("trackio",),
}
