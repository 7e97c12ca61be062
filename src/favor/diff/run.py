"""`favor diff`: two models answer the same prompts, batch by batch, until the prompts or the doubts end.

In: DiffConfig. Out: figures, gates, the examples that changed most; JSON, a page. Next: settings.py.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from favor import output
from favor.data.formats import RowError
from favor.data.formats.fields import tools_of
from favor.data.prompts import encode_prompts, prompt_rows
from favor.data.types import sampled_tree
from favor.diff.calls import form_of
from favor.diff.checks import questions, right, trees_of
from favor.diff.examples import most_changed
from favor.diff.figures import FIGURES, Figure, Gate, Values, all_measured, as_json, judged, verdict_of
from favor.diff.measure import Asked, Pair, Side, comparable, judge_of, pairs_of, per_token, values_of
from favor.diff.page import page
from favor.diff.settings import DiffConfig
from favor.diff.signs import wanted
from favor.errors import ConfigError, DataError, NumericsError
from favor.eval.intervals import Array
from favor.generate.samples import Progress
from favor.model.layout import settle
from favor.model.load import load_policy, precision_of
from favor.output import Output
from favor.rewards.source import check_scorer, make_scorer, reads
from favor.train.health import distinct

# what decides whether a row asks for a figure, and what to say where none does
_OF_ROWS = {"json": "row asks for JSON", **dict.fromkeys(("called", "bad_call"), "row has tools")}


class Subject(NamedTuple):
    """Both models and the prompts; what is left out, in sentences; the checks that each has right."""

    sides: dict[str, Side]
    asked: list[Asked]
    notes: list[str]
    checks: Array


class Found(NamedTuple):
    """What was measured of so many prompts: all pairs of answers, figures, gates."""

    pairs: list[Pair]
    figures: dict[str, Figure]
    gates: list[Gate]


def diff(
    config: DiffConfig, say: Callable[[str], None], progress: Progress, recipe: Path | None = None
) -> dict[str, Any]:
    """Measure, write what was asked for, and return the figures. recipe: where the settings come from.

    Raises ConfigError, DataError or CheckpointError when something cannot be used, NumericsError for log-probs that are not finite.
    """
    asked = {"out": config.out, "page": config.page}
    outputs = [Output(Path(path), key, config.overwrite) for key, path in asked.items() if path is not None]
    read = [config.prompts, config.a.path, config.b.path, recipe and str(recipe)]
    read += reads(config.reward) if config.reward else ()
    with output.all_claimed(outputs, read):
        if config.reward is not None:
            check_scorer(config.reward)
        subject = _subject(config, say)
        figures = _told(config, subject, _measured(config, subject, progress))
        texts = {"out": json.dumps(figures, indent=2, ensure_ascii=False) + "\n", "page": page(figures)}
        for out in outputs:
            output.write(out, {out.path: texts[out.key]}, None)
    return figures


def _subject(config: DiffConfig, say: Callable[[str], None]) -> Subject:
    """Prompts and models, loaded and settled. Raises ConfigError for a gate that these rows cannot decide."""
    asked = list(_asked(config))
    tools, as_object = any(one.wanted.tools for one in asked), any(one.wanted.json for one in asked)
    rows = {"json": as_object, "called": tools, "bad_call": tools}
    for name in config.gate:
        if not rows.get(name, True):
            raise ConfigError(
                f"gate.{name}: no {_OF_ROWS[name]} in {config.prompts}; remove the gate, or name other prompts"
            )
    sides: dict[str, Side] = {}
    right_of: list[Array] = []
    for name in config.sides:
        sides[name], checks = _side(config, name, asked, say)
        right_of.append(checks)
    notes = _notes(config, sides, tools=tools)
    for name in ("kl", "reverse_kl"):
        if name in config.gate and not comparable(sides):
            raise ConfigError(f"gate.{name}: {notes[0]}; remove the gate")
    if (found := config.gate.keys() & {"called", "bad_call"}) and any(side.form is None for side in sides.values()):
        raise ConfigError(f"gate.{min(found)}: {notes[-1]}; remove the gate")
    return Subject(sides, asked, notes, np.stack(right_of, 1))


def _asked(config: DiffConfig) -> Iterator[Asked]:
    """Every distinct prompt with what it asks for. Raises DataError for a row that cannot be used."""
    seen: set[str] = set()
    for number, prompt, row in prompt_rows(config.prompts, config.split, config.columns):
        try:
            asks = wanted(row, prompt, tools_of(row))
        except RowError as error:
            raise DataError(f"{config.prompts}, row {number}: {error}; fix the row") from None
        key = json.dumps([prompt, asks], sort_keys=True)
        if key not in seen:
            yield Asked(len(seen), number, prompt, asks)
            seen.add(key)
        if len(seen) == config.max_prompts:
            return


def _side(config: DiffConfig, name: str, asked: Sequence[Asked], say: Callable[[str], None]) -> tuple[Side, Array]:
    model = config.sides[name]
    policy = load_policy(model, frozen=True)
    given = [{"tools": list(one.wanted.tools)} if one.wanted.tools else {} for one in asked]
    numbered = [(one.row, one.prompt) for one in asked]
    prompts = encode_prompts(config.prompts, numbered, policy.tokenizer, config.tokens.full, given)
    checks = trees_of(questions(), policy.tokenizer) if config.checks else []
    drawn = (sampled_tree(prompt, config.sample.max_new_tokens) for prompt in prompts[2:])
    first = [sampled_tree(prompt, config.sample.max_new_tokens) for prompt in prompts[:2]]
    policy, why = settle(policy, model.layout, first, also=(*drawn, *checks))
    say(f"{name}: {why}")
    known = right(policy, checks, config.max_tokens_per_pack) if checks else np.zeros(0)
    return Side(policy, prompts, form_of(policy.tokenizer)), known


def _notes(config: DiffConfig, sides: Mapping[str, Side], *, tools: bool) -> list[str]:
    """What is left out, and why."""
    said: list[str] = []
    if not comparable(sides):
        said.append("KL is left out: the models do not read the same tokens (another tokenizer or chat template)")
    elif not config.tells_kl:
        said.append("KL is left out: it is of samples at sample.temperature=1")
    lost = [name for name, side in sides.items() if side.form is None]
    if tools and lost:
        said.append(f"calls are left out: the chat template of {' and '.join(lost)} writes none as JSON")
    return said


def _measured(config: DiffConfig, subject: Subject, progress: Progress) -> Found:
    """Batch by batch, in an order that the seed decides, until all prompts are answered or every gate is settled."""
    order = np.random.default_rng(config.seed).permutation(len(subject.asked)).tolist()
    judge = judge_of(config, subject.sides, None if config.reward is None else make_scorer(config.reward))
    size = max(1, config.sample.batch // config.samples_per_prompt)
    total = 2 * len(order) * config.samples_per_prompt
    pairs: list[Pair] = []
    for start in range(0, len(order), size):
        some = [subject.asked[place] for place in order[start : start + size]]
        pairs += pairs_of(config, subject.sides, judge, some, lambda done: progress("answers", done, total))
        # other figures are made once, at the end
        if config.stop_early and all(gate.verdict != "not settled" for gate in _found(config, subject, pairs).gates):
            break
    return _found(config, subject, pairs)


def _found(config: DiffConfig, subject: Subject, pairs: list[Pair]) -> Found:
    """Figures and gates of the answers so far."""
    arrays = values_of(pairs, config) | ({"checks": subject.checks} if config.checks else {})
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise NumericsError("log-probs or rewards of the answers are not finite; look at both models with favor doctor")
    # rows that ask for it may be still to come
    arrays = {name: np.zeros((0, 2)) for name in config.gate} | arrays
    values = {name: Values(array[:, 0], array[:, 1]) for name, array in arrays.items()}
    figures = all_measured(values, {name: config.bounds(name) for name in FIGURES}, config.gate)
    return Found(pairs, figures, judged(figures, config.gate))


def _told(config: DiffConfig, subject: Subject, found: Found) -> dict[str, Any]:
    """The content of the JSON file."""
    ratios = [ratio for pair in found.pairs if (ratio := per_token(pair)) is not None]
    clipped = sum(max(map(abs, ratio)) > config.kl_clip for ratio in ratios)
    notes = [*subject.notes]
    if clipped:
        notes.append(
            f"{clipped} of {len(ratios)} pairs of answers have log-ratios beyond kl_clip={config.kl_clip:g} nats a token"
        )
    return {
        "a": config.a.path,
        "b": config.b.path,
        "prompts": len(subject.asked),
        "answered": len(found.pairs) // config.samples_per_prompt,
        "samples_per_prompt": config.samples_per_prompt,
        "sample": config.sample.model_dump(exclude={"batch"}),
        "seed": config.seed,
        "precision": {name: precision_of(model.dtype) for name, model in config.sides.items()},
        "verdict": verdict_of(found.gates, config.unsettled),
        "unsettled": config.unsettled,
        "gates": [gate._asdict() for gate in found.gates],
        "figures": as_json(found.figures),
        "means": _means(found.pairs),
        "left_out": notes,
        "examples": most_changed(found.pairs, config.examples),
    }


def _means(pairs: Sequence[Pair]) -> dict[str, Any]:
    """What has no interval: distinct 2-grams over all answers, KL of whole answers in nats, rewards."""
    found: dict[str, Any] = {
        "distinct_over_all": [
            distinct([one.said for one in side]) for side in zip(*((p.a, p.b) for p in pairs), strict=True)
        ]
    }
    if pairs[0].log_ratio is not None:
        kl, reverse = np.mean([pair.log_ratio for pair in pairs if pair.log_ratio], axis=0).tolist()
        found |= {"kl_of_answers": kl, "reverse_kl_of_answers": -reverse}
    if pairs[0].reward is not None:
        found["reward"] = np.mean([pair.reward for pair in pairs if pair.reward], axis=0).tolist()
    return found
