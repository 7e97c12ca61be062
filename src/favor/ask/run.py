"""`favor ask`: the pairs to label next, for `favor label`; and from those drawn by chance, whether it is enough.

In: AskConfig. Out: JSON lines of pairs, a history of what was foretold. Next: settings.py.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from favor import output
from favor.ask.choose import by_margin
from favor.ask.settings import AskConfig
from favor.data.grow import key_of
from favor.data.types import Comparison, PromptTree, Text
from favor.errors import ConfigError, DataError
from favor.eval.sequence import sequence
from favor.guard import sha
from favor.label.intake import take_in
from favor.label.settings import LabelConfig
from favor.label.store import Pair as Unlabelled
from favor.output import Output
from favor.run import jsonl, read_jsonl
from favor.value.cheap import Array, Cases, margins
from favor.value.pairs import How, Part, Row, parts, read_rows

Progress: TypeAlias = Callable[[str, int, int], None]
# fewer labelled prompts say nothing
_LEAST, _FOLDS = 10, 5


class Foretold(NamedTuple):
    """A line of the history: a pair, whether it was drawn by chance, which answer all labels and half of them favored.

    A pair that was chosen in one round and drawn by chance in a later one has two lines.
    """

    pair: str
    by_chance: bool
    first: str
    by_all: float | None
    by_half: float | None


def ask(config: AskConfig, progress: Progress, recipe: Path | None = None) -> dict[str, Any]:
    """Write the pairs to label and add them to the history; returns the figures. recipe: where the settings come from.

    Raises DataError, ConfigError or CheckpointError when something cannot be used; ConfigError for pairs that were asked about
    already, which nobody would see again.
    """
    if Path(config.out).exists() and not config.overwrite:
        raise ConfigError(
            f"{config.out}: is there; label its pairs, and ask for the next with data=LABELS overwrite=true (pairs that stay "
            "without a label are not asked about again)"
        )
    outputs = [
        Output(Path(config.out), "out", config.overwrite),
        Output(Path(config.history), "history", overwrite=True),
    ]
    read = [config.pool, *(source.path for source in (config.data.parts if config.data else ())), config.model.path]
    with output.all_claimed(outputs, [*read, recipe and str(recipe)]):
        before, pool = _history(Path(config.history)), _pool(config)
        found = _parts(config, pool, progress)
        labels, asked = _labels(found.get("train")), {line.pair for line in before}
        mine = found["pool"].pairs
        open_T = np.array([place for place, pair in enumerate(mine) if _name(pair.text) not in labels.keys() | asked])
        if not len(open_T):
            raise DataError(f"{config.pool}: every pair has been asked about; give more with pool=FILE")
        rng = np.random.default_rng([config.seed, len(before)])
        cases = found["pool"].cases.some(open_T)
        told = [_foretell(config, found.get("train"), cases.gap_PF, share, rng) for share in (1.0, 0.5)]
        names = [_name(pair.text) for pair in mine]
        by_chance, again = drawn(config, before, names, open_T.tolist(), rng)
        before = [*before, *again]
        chosen = [*by_chance, *_chosen(config, told[0], cases, by_chance, rng)]
        texts = [mine[place].text for place in open_T[chosen]]
        lines = [_line(text, place in by_chance, told, place) for text, place in zip(texts, chosen, strict=True)]
        figures = _settled(config, before, labels) | {
            "asked": len(lines),
            "by_chance": len(by_chance),
            "labelled": len(labels),
            "waiting": len(asked - labels.keys()),
            "left": len(open_T) - len(lines),
        }
        rows = [_row(pool[text.rows[0] - 1]) for text in texts]
        output.write(outputs[0], {outputs[0].path: jsonl(rows)}, None)
        output.write(outputs[1], {outputs[1].path: jsonl(line._asdict() for line in [*before, *lines])}, None)
    return figures


def _pool(config: AskConfig) -> list[Unlabelled]:
    """The pairs that `favor label` would show of the pool."""
    ((_, found),) = take_in(LabelConfig(data=config.pool))
    return list({pair.key: pair for pair in found}.values())


def _parts(config: AskConfig, pool: Sequence[Unlabelled], progress: Progress) -> dict[str, Part]:
    rows: dict[str, list[Row]] = {"pool": [_as_row(config, number, pair) for number, pair in enumerate(pool, 1)]}
    if config.data is not None:
        rows["train"] = list(read_rows(config.data.parts, "all", config.data))
    bad_rows = config.data.bad_rows if config.data else "error"
    return parts(rows, How(config.model, config.tokens, bad_rows, config.max_tokens_per_pack), progress)


def _as_row(config: AskConfig, number: int, pair: Unlabelled) -> Row:
    """An unlabelled pair as a row whose first answer is called the better one, which nobody believes."""
    cut = tuple(side for side, ended in enumerate(pair.ended) if not ended)
    tree = PromptTree(
        pair.prompt, (pair.first, pair.second), (Comparison((0, 1)),), (number,), config.pool, pair.tools, cut=cut
    )
    return tree, key_of([pair.prompt, pair.tools, None])


def _foretell(
    config: AskConfig, part: Part | None, gap_TF: Array, share: float, rng: np.random.Generator
) -> Array | None:
    """Mean margins by heads of this share of the labelled prompts; None of too few labels."""
    if part is None:
        return None
    labelled = part.cases
    prompts = rng.permutation(np.unique(labelled.prompt_P))
    some = labelled.some(np.isin(labelled.prompt_P, prompts[: round(share * len(prompts))]))
    if len(np.unique(some.prompt_P)) < _LEAST:
        return None
    return margins(some, gap_TF, config.models, _FOLDS, config.seed).other_HT.mean(0)


def drawn(
    config: AskConfig, before: Sequence[Foretold], names: Sequence[str], open_T: Sequence[int], rng: np.random.Generator
) -> tuple[list[int], list[Foretold]]:
    """The pairs that chance asks about, as indices of open_T, and those that it draws of the pairs that were chosen before.

    It draws from the whole pool, each pair once over all rounds: among those still open the ones that were hard to tell are
    missing, and a model would look better than it is. A chosen pair that is drawn counts by what was foretold of it then.
    """
    places = {place: index for index, place in enumerate(open_T)}
    done = {line.pair for line in before if line.by_chance}
    asked = {line.pair: line for line in before}
    wanted = round(config.by_chance * min(config.count, len(open_T)))
    found, again = list[int](), list[Foretold]()
    for place in map(int, rng.permutation(len(names))):
        if len(found) == wanted:
            break
        if place in places:
            found.append(places[place])
        elif names[place] in asked.keys() - done:
            again.append(asked[names[place]]._replace(by_chance=True))
    return found, again


def _chosen(
    config: AskConfig, margin_T: Array | None, cases: Cases, taken: Sequence[int], rng: np.random.Generator
) -> list[int]:
    """Places of the other pairs to ask about, behind those taken by chance, which draws these too before there is a model."""
    rest = np.setdiff1d(np.arange(len(cases.gap_PF)), taken)
    wanted = min(config.count, len(cases.gap_PF)) - len(taken)
    if margin_T is None or wanted == 0:
        return rng.permutation(rest)[:wanted].tolist()
    scaled_TF = cases.gap_PF[rest] / np.maximum(np.sqrt((cases.gap_PF**2).mean(0)), 1e-12)
    return rest[by_margin(margin_T[rest], scaled_TF, wanted)].tolist()


def _settled(config: AskConfig, before: Sequence[Foretold], labels: Mapping[str, str]) -> dict[str, Any]:
    """Accuracy before labelling, and what the second half of the labels added to it, on the pairs drawn by chance."""
    known = [line for line in before if line.by_chance and line.pair in labels and line.by_all is not None]
    right = np.array([_right(line.by_all, line, labels) for line in known])
    both = [line for line in known if line.by_half is not None]
    gain = np.array([_right(line.by_all, line, labels) - _right(line.by_half, line, labels) for line in both])
    low, high = sequence(right) if len(right) else (0.0, 1.0)
    least, most = sequence(gain, -1.0, 1.0) if len(gain) else (-1.0, 1.0)
    return {
        "accuracy": float(right.mean()) if len(right) else None,
        "accuracy_sequence": (low, high),
        "gain": float(gain.mean()) if len(gain) else None,
        "gain_sequence": (least, most),
        "foretold": len(right),
        "settled": most < config.gain or (config.enough is not None and low >= config.enough),
    }


def _right(margin: float | None, line: Foretold, labels: Mapping[str, str]) -> float:
    assert margin is not None
    return float((margin > 0) == (labels[line.pair] == line.first))


def _labels(part: Part | None) -> dict[str, str]:
    """Every labelled pair and its better answer, by name."""
    found = part.pairs if part else []
    return {_name(p.text, p.chosen, p.rejected): _side(p.text.responses[p.chosen]) for p in found}


def _line(text: PromptTree, by_chance: bool, told: Sequence[Array | None], place: int) -> Foretold:
    margins_of = (None if margin_T is None else float(margin_T[place]) for margin_T in told)
    return Foretold(_name(text), by_chance, _side(text.responses[0]), *margins_of)


def _name(text: PromptTree, a: int = 0, b: int = 1) -> str:
    """The same for the same prompt and answers, in whichever order."""
    return sha(json.dumps([_side(text.prompt), *sorted((_side(text.responses[a]), _side(text.responses[b])))]))[:16]


def _side(text: Text) -> str:
    return sha(json.dumps(text, sort_keys=True))[:16]


def _row(pair: Unlabelled) -> dict[str, Any]:
    """A line that `favor label` reads."""
    row: dict[str, Any] = {"prompt": pair.prompt, "responses": [pair.first, pair.second], "ended": list(pair.ended)}
    return row | ({"tools": pair.tools} if pair.tools else {})


def _history(path: Path) -> list[Foretold]:
    """Raises DataError for a file that is no history."""
    if not path.exists():
        return []
    try:
        return [Foretold(**line) for line in read_jsonl(path)]
    except (TypeError, ValueError):
        raise DataError(f"{path}: is no history of favor ask; name another with history=FILE") from None
