"""`favor from-trl`: a configuration of TRL as a recipe of favor, with a comment for what is not the same or has no equal.

In: names and values of TRL. Out: TOML that `favor train` reads. Next: ../train/preference.py.
"""

import math
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import tomli_w

from favor.config import checked
from favor.errors import ConfigError, clipped
from favor.losses.table import LOSSES
from favor.train.preference import TrainConfig
from favor.trl.names import KEYS, SAID
from favor.trl.names import LOSSES as LOSS_NAMES
from favor.trl.read import Given, read_config

# what TRL 1.16 does where nothing is said, and favor does not
_DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-6,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_length": 1024,
    "truncation_mode": "keep_start",
    "seed": 42,
}
_NUMBERS = ("weight_decay", "adam_epsilon", "max_grad_norm", "beta", "learning_rate")
_COUNTS = ("seed", "save_total_limit")
_AS_THEY_ARE = (
    *("gradient_checkpointing", "trust_remote_code", "model_name_or_path", "model_revision", "output_dir"),
    *("dataset_name", "dataset_train_split", "dataset_test_split"),
)
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
_TRUNCATIONS = {"keep_start": "response_end", "keep_end": "prompt_start"}
_DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "jensen_shannon", "alpha_divergence": "alpha"}
# what of TRL is about the machine, the hub or the process, and decides nothing that is learnt
_SURROUNDINGS = (
    "dataloader_",
    "hub_",
    "push_to_hub",
    "ddp_",
    "torch_",
    "log_",
    "logging_",
    "include_",
    "do_",
    "use_cpu",
)


@dataclass(frozen=True)
class Line:
    """A setting with a comment, or (without a key) a comment alone."""

    key: str
    value: Any = None
    comment: str = ""


Lines: TypeAlias = Iterator[Line]


def recipe_of(path: Path) -> str:
    """The recipe as TOML text. Raises ConfigError as `read_config`, and for values that favor cannot take."""
    given = read_config(path)
    lines = [*_lines(given), *_missing(path, given)]
    text = _written(path, lines)
    checked(TrainConfig, tomllib.loads(text), str(path))
    return text


def _lines(given: Given) -> Lines:
    said = given.values
    values = _Values(_DEFAULTS | {name: value for name, value in said.items() if value is not None}, frozenset(said))
    for part in (_plain, _batch, _length, _rate, _precision, _loss, _reference, _adapters, _saving):
        yield from part(values)
    for name, source in given.computed.items():
        yield Line("", comment=f"{name} = {source}: computed, so not known here; {_where(name)}")
    for name, value in said.items():
        yield from _unequal(name, value)


@dataclass(frozen=True)
class _Values:
    """Values of TRL, its defaults among them; `said` are the names that the file gives."""

    of: Mapping[str, Any]
    said: frozenset[str]

    def number(self, name: str, make: Callable[[Any], Any] = float) -> Any:
        """A number; YAML reads 5e-6 as text, as TRL's own reader allows."""
        try:
            return make(self.of[name])
        except (TypeError, ValueError):
            raise ConfigError(f"{name} is {self.of[name]!r:.80}, expected a number; fix it") from None

    def from_default(self, *names: str) -> str:
        """A comment where none of these is said."""
        return "" if any(name in self.said for name in names) else "TRL's default"


def _plain(values: _Values) -> Lines:
    for name in (*_NUMBERS, *_COUNTS):
        if name in values.of and name != "beta":
            make = int if name in _COUNTS else float
            yield Line(KEYS[name], values.number(name, make), values.from_default(name))
    for name in _AS_THEY_ARE:
        if (value := values.of.get(name)) is not None:
            yield Line(KEYS[name], value)
    if "adam_beta1" in values.of or "adam_beta2" in values.of:
        both = _Values({"adam_beta1": 0.9, "adam_beta2": 0.999, **values.of}, values.said)
        yield Line("optim.betas", [both.number("adam_beta1"), both.number("adam_beta2")])


def _batch(values: _Values) -> Lines:
    each, times = (values.number(n, int) for n in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    said = f"{each} x {times} of one device, times the number of devices; favor counts prompts, each with all its pairs"
    default = values.from_default("per_device_train_batch_size", "gradient_accumulation_steps")
    yield Line("train.batch_prompts", each * times, f"{default}: {said}" if default else said)
    epochs, steps = (
        values.number("num_train_epochs"),
        values.number("max_steps", int) if "max_steps" in values.of else -1,
    )
    if steps > 0:
        yield Line("train.max_steps", steps)
        yield Line("train.epochs", steps, "max_steps alone ends the run, as in TRL")
    else:
        whole = max(1, math.ceil(epochs))
        part = "" if whole == epochs else f"TRL: {epochs:g}; favor takes whole passes, or set train.max_steps"
        yield Line("train.epochs", whole, part or values.from_default("num_train_epochs"))


def _length(values: _Values) -> Lines:
    if "max_length" in values.said and "max_length" in values.of:
        yield Line("tokens.max_tokens", values.number("max_length", int))
    mode = _TRUNCATIONS.get(values.of["truncation_mode"])
    if mode is None:
        yield Line(
            "", comment=f"truncation_mode = {values.of['truncation_mode']!r} is not known; tokens.truncation is 'drop'"
        )
    else:
        yield Line("tokens.truncation", mode, values.from_default("truncation_mode"))


def _rate(values: _Values) -> Lines:
    name = str(values.of.get("lr_scheduler_type", "linear"))
    if name not in _SCHEDULES:
        yield Line("", comment=f"lr_scheduler_type = {name!r} has no equal: favor has constant, linear, cosine")
    elif name != "linear":
        yield Line("optim.schedule", _SCHEDULES[name])
    warmup, share = (values.number(n) if n in values.of else 0.0 for n in ("warmup_steps", "warmup_ratio"))
    share = warmup if 0 < warmup < 1 else share
    if warmup >= 1 and name != "constant":
        yield Line("optim.warmup", int(warmup))
    elif share > 0 and name != "constant":
        yield Line("optim.warmup", share)
    optimizer = str(values.of.get("optim", "adamw_torch"))
    if optimizer == "rmsprop":
        yield Line("optim.kind", "rmsprop")
    elif optimizer in ("adamw_8bit", "adamw_bnb_8bit"):
        yield Line("optim.kind", "adamw8bit", "needs favor[bitsandbytes]")
    elif not optimizer.startswith("adamw") or any(part in optimizer for part in ("bit", "bnb", "4", "8")):
        yield Line("", comment=f"optim = {optimizer!r} has no equal: favor has adamw, adamw8bit and rmsprop")


def _precision(values: _Values) -> Lines:
    if values.of.get("bf16") is True:
        yield Line("model.dtype", "bfloat16", "products; weights, and all that is measured, are float32")
    elif values.of.get("fp16"):
        yield Line("", comment="fp16: favor computes in float32 or bfloat16 (model.dtype)")
    elif "bf16" not in values.said:
        yield Line("", comment='TRL computes in bfloat16 by default; favor in float32 unless model.dtype = "bfloat16"')


def _loss(values: _Values) -> Lines:
    names = values.of.get("loss_type", ["sigmoid"])
    names = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if name not in LOSS_NAMES]
    if unknown:
        raise ConfigError(
            f"loss_type {unknown[0]!r}: not a loss of TRL that favor knows; see docs/losses.md for its kinds"
        )
    weights = values.of.get("loss_weights") or [1.0] * len(names)
    if len(weights) != len(names):
        raise ConfigError(f"loss_weights has {len(weights)} numbers for {len(names)} losses; give one for each")
    sections = [_section(name, values) for name in names]
    if len(sections) == 1:
        for key, value in sections[0].items():
            yield Line(f"loss.{key}", value)
    else:
        yield Line("loss.kind", "sum")
        terms = [{**section, "weight": float(weight)} for section, weight in zip(sections, weights, strict=True)]
        yield Line("loss.terms", terms)
    yield from _differences(names, values)


def _section(name: str, values: _Values) -> dict[str, Any]:
    """A table [loss], or one of its terms."""
    kind, fixed = LOSS_NAMES[name]
    reads = LOSSES[kind].settings()
    found: dict[str, Any] = {"kind": kind, **fixed}
    for trl in ("beta", "discopop_tau", "ld_alpha", "label_smoothing"):
        value = values.number(trl) if trl in values.of else None
        if trl in reads and value is not None and (value or trl != "label_smoothing"):
            found[trl] = value
    if values.of.get("use_weighting") and "wpo" in reads:
        found["wpo"] = "probability"
    divergence = _DIVERGENCES.get(str(values.of.get("f_divergence_type")))
    if divergence and "divergence" in reads:
        coefficient = values.number("f_alpha_divergence_coef") if "f_alpha_divergence_coef" in values.of else 0.5
        found["divergence"] = {"kind": divergence} | ({"alpha": 1 - coefficient} if divergence == "alpha" else {})
    return found


def _differences(names: list[str], values: _Values) -> Lines:
    """What is not the same in the two programs' losses; docs/trl_differences.md says more."""
    if "bco_pair" in names:
        yield Line("", comment="loss bco: favor centres rewards over the optimizer batch, TRL's bco_pair does not")
    if values.of.get("use_weighting"):
        yield Line("", comment="loss.wpo: favor's weights are at most 1, as in the paper; TRL's may be larger")
    if "sigmoid" in names and values.of.get("label_smoothing"):
        said = "label_smoothing: TRL 1.16's sigmoid does not read it; for what it did before, write loss.kind"
        yield Line("", comment=f'{said} = "cdpo", label_smoothing = {values.of["label_smoothing"]}')
    if values.of.get("f_divergence_type") == "alpha_divergence":
        yield Line("", comment="loss.divergence.alpha: 1 - TRL's f_alpha_divergence_coef")


def _reference(values: _Values) -> Lines:
    if values.of.get("sync_ref_model"):
        yield Line("reference.mode", "live")
        yield Line("reference.sync.every", int(values.of.get("ref_model_sync_steps", 512)))
        yield Line("reference.sync.weight", float(values.of.get("ref_model_mixup_alpha", 0.6)))
    elif values.of.get("ld_alpha") is not None:
        yield Line("reference.mode", "live", "loss.ld_alpha reads single tokens")


def _adapters(values: _Values) -> Lines:
    if values.of.get("use_peft"):
        yield Line("model.lora.rank", int(values.of.get("lora_r", 16)))
        yield Line("model.lora.alpha", int(values.of.get("lora_alpha", 32)))
        if targets := values.of.get("lora_target_modules"):
            yield Line("model.lora.targets", targets if isinstance(targets, str) else list(targets))
        if values.of.get("lora_dropout"):
            yield Line("", comment=f"lora_dropout = {values.of['lora_dropout']}: {SAID['lora_dropout']}")


def _saving(values: _Values) -> Lines:
    strategy = str(values.of.get("save_strategy", "steps"))
    if strategy == "no":
        yield Line("save.every", 0, "only when the run is told to stop")
    elif "save_steps" in values.of and values.number("save_steps") >= 1:
        yield Line("save.every", values.number("save_steps", int))
    if values.of.get("eval_strategy", "no") == "steps" and values.of.get("eval_steps"):
        said = f"watch.eval.every = {values.of['eval_steps']}, once data.eval or data.hold_out.share is set"
        yield Line("", comment=f"held-out figures while training: {said}")


# names that the functions above read
_READ = {
    *_DEFAULTS,
    *_NUMBERS,
    *_COUNTS,
    *_AS_THEY_ARE,
    *(
        "adam_beta1",
        "adam_beta2",
        "max_steps",
        "lr_scheduler_type",
        "warmup_steps",
        "warmup_ratio",
        "optim",
        "bf16",
        "fp16",
    ),
    *("loss_type", "loss_weights", "discopop_tau", "ld_alpha", "label_smoothing", "use_weighting", "f_divergence_type"),
    *(
        "f_alpha_divergence_coef",
        "sync_ref_model",
        "ref_model_sync_steps",
        "ref_model_mixup_alpha",
        "use_peft",
        "lora_r",
    ),
    *(
        "lora_alpha",
        "lora_target_modules",
        "lora_dropout",
        "save_strategy",
        "save_steps",
        "eval_strategy",
        "eval_steps",
    ),
    # favor does these, or needs nothing for them
    *("precompute_ref_log_probs", "disable_dropout", "padding_free", "task_type", "bias"),
}


def _unequal(name: str, value: Any) -> Lines:
    """A comment on what has no equal; what says nothing (None, false, its default) is left unsaid."""
    quiet = value in (None, False, 0, "", "no", "none") or value == [] or value == {} or value == _usual().get(name)
    if name in _READ or name.startswith("_") or quiet:
        return
    shown = clipped(" ".join(repr(value).split()), 60)
    if name in SAID:
        yield Line("", comment=f"{name} = {shown}: {SAID[name]}")
    elif not name.startswith(_SURROUNDINGS):
        yield Line("", comment=f"{name} = {shown}: favor has no setting for it")


def _usual() -> dict[str, Any]:
    """The defaults of transformers' TrainingArguments: a saved dict holds them all."""
    import dataclasses

    from transformers import TrainingArguments

    return {field.name: field.default for field in dataclasses.fields(TrainingArguments)}


def _where(name: str) -> str:
    return f"set {KEYS[name]}" if name in KEYS else SAID.get(name, "favor has no setting for it")


def _missing(path: Path, given: Given) -> Lines:
    """What every recipe needs and the file may not say."""
    for name, value in (
        ("model_name_or_path", "MODEL"),
        ("dataset_name", "prefs.jsonl"),
        ("output_dir", f"runs/{path.stem}"),
    ):
        if given.values.get(name) is None:
            told = "a model folder or hub id" if name == "model_name_or_path" else "preferences: a file or hub id"
            yield Line(KEYS[name], value, "" if name == "output_dir" else f"not in {path.name}: {told}")


def _written(path: Path, lines: list[Line]) -> str:
    """Sections in order of appearance, settings of the recipe first, then what has no equal."""
    notes = [line.comment for line in lines if not line.key]
    sections: dict[str, list[str]] = {"": []}
    for line in lines:
        if line.key:
            section, _, name = line.key.rpartition(".")
            text = (
                tomli_w.dumps({name: line.value}).strip()
                if not isinstance(line.value, list | dict)
                else _inline(name, line)
            )
            sections.setdefault(section, []).append(f"{text}  # {line.comment}" if line.comment else text)
    body = [f"# from {path.name} by favor from-trl; what TRL and favor compute differently: docs/trl_differences.md"]
    for section, settings in sections.items():
        body += ["", *([f"[{section}]"] if section else []), *settings]
    return "\n".join([*body, "", *(f"# {note}" for note in notes)]).strip() + "\n"


def _inline(name: str, line: Line) -> str:
    """A list or table on one line, so that its comment stands beside it."""
    return f"{name} = {_toml(line.value)}"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return tomli_w.dumps({"v": value}).strip().removeprefix("v = ")
