"""The cases: what is trained, why it matters, how it is judged.

In: cases.toml. Out: JOBS, the runs of a trainer; cases, each read off some of them. Next: judge.py.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from favor.conform.judge import JUDGES, Judge
from favor.conform.oracle import Row, Steps
from favor.conform.subjects import WORDS

Call: TypeAlias = Mapping[str, Any]
_ONE_CALL: Sequence[Call] = ({},)


@dataclass(frozen=True)
class Job:
    """One run. calls: what is added to the settings at each call of train; between: the clip lies between its first two norms."""

    subject: str
    rows: Sequence[Row]
    steps: Steps
    calls: Sequence[Call] = _ONE_CALL
    ranks: int = 1
    between: bool = False


class Case(NamedTuple):
    """What must hold, why it matters, the runs that show it. refusal: a trainer may refuse these rows, or say that it differs."""

    name: str
    holds: str
    why: str
    jobs: tuple[str, ...]
    judged: Judge
    refusal: bool = False


def _said(count: int, start: int) -> str:
    """So many words of one token each."""
    return " ".join(WORDS[(start + 5 * i) % len(WORDS)] for i in range(count))


def _chat(question: str, chosen: str, rejected: str) -> Row:
    turn = {"role": "user", "content": question}
    return _turns([turn], chosen, rejected)


def _turns(prompt: Sequence[Mapping[str, str]], chosen: str, rejected: str) -> Row:
    sides = {
        side: [{"role": "assistant", "content": text}] for side, text in (("chosen", chosen), ("rejected", rejected))
    }
    return {"prompt": list(prompt), **sides}


def _even(count: int, *lengths: int) -> list[Row]:
    """Pairs whose sides are equally long, so that neither needs padding beside the other."""
    lengths = lengths or (6,)
    sizes = [lengths[i % len(lengths)] for i in range(count)]
    return [_chat(f"the film {WORDS[i]}", _said(n, i), _said(n, i + 2)) for i, n in enumerate(sizes)]


def _plain(prompt: str, chosen: str, rejected: str) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


_FOUR = _even(4)
_UNEVEN = [_chat("the film", _said(14, 0), _said(2, 1))]
_SHORT = [_chat(f"a {WORDS[i]}", _said(1, i), _said(1, i + 2)) for i in range(4)]
_TALK = (
    {"role": "system", "content": "film story"},
    {"role": "user", "content": "the film is long"},
    {"role": "assistant", "content": "quite slow"},
    {"role": "user", "content": "never dull"},
)
# accents composed and combining, right to left, wide, outside the basic plane, joined
_SIGNS = (
    "so",
    "na\u00efve",
    "cafe\u0301",
    "\u6f22\u5b57",
    "\u05e9\u05dc\u05d5\u05dd",
    "\U0001f469\u200d\U0001f680",
    "\u20ac",
)
_BLANK = _plain("the film is", " " + _said(6, 0), " " + _said(6, 3))
_MERGED = _plain("the film is ", _said(6, 0), _said(6, 3))
_CUT = [_chat("film", _said(4, 0), _said(4, 2)), _chat("story", _said(60, 1), _said(60, 4))]


def _at(rows: Sequence[Row], **steps: Any) -> tuple[Sequence[Row], Steps]:
    """All rows in one step, unless it is said otherwise."""
    return rows, Steps(**({"batch": len(rows)} | steps))


# so small that the reference's part in the second gradient stays below what is tolerated; AdamW does not see its size
_FAINT = {"lr": 1e-4, "beta": 0.01}
_TWICE = {"epochs": 2}

JOBS: Mapping[str, Job] = MappingProxyType(
    {
        "step": Job("chat", *_at(_FOUR[:1])),
        "behind": Job("line_break", *_at(_FOUR[:1])),
        "reference": Job("chat", *_at(_FOUR[:2], batch=1, epochs=3)),
        # the first step does not see which answer is compared with which
        "mean": Job("chat", *_at(_FOUR, **_TWICE)),
        "reversed": Job("chat", *_at(_FOUR[::-1], **_TWICE)),
        "padding": Job("chat", *_at(_UNEVEN)),
        "pad_is_end": Job("pad_is_end", *_at(_FOUR[:1])),
        "begin": Job("begin", *_at(_FOUR[:1])),
        "blank": Job("plain", *_at([_BLANK])),
        "merged": Job("plain", *_at([_MERGED])),
        "signs": Job("chat", *_at([_chat("caf\u00e9?", " ".join(_SIGNS), " ".join((_SIGNS[0], *_SIGNS[:0:-1])))])),
        "turns": Job("chat", *_at([_turns(_TALK, _said(6, 0), _said(6, 3))])),
        "duplicates": Job("chat", *_at([*_FOUR[:2], _FOUR[0], _chat("the film good", _said(6, 5), _said(6, 9))])),
        "equal": Job("chat", *_at([_FOUR[0], _chat("the film dull", _said(6, 1), _said(6, 1))])),
        "clip": Job("chat", *_at([*_even(4, 40), *_SHORT], batch=4, epochs=2, **_FAINT), between=True),
        "accumulation": Job(
            "chat",
            *_at([*_even(4, 44, 40, 36, 32), *_SHORT], batch=4, epochs=2, accumulation=4, **_FAINT),
            between=True,
        ),
        "short_micro": Job("chat", *_at(_FOUR[:3], batch=4, accumulation=2)),
        "last": Job("chat", *_at([*_even(2, 9), _SHORT[0]], batch=2, **_FAINT)),
        "fits": Job("chat", *_at(_CUT, max_length=200)),
        "cut": Job("chat", *_at(_CUT, max_length=32)),
        "dropout": Job("dropout", *_at(_FOUR[:1])),
        "whole": Job("chat", *_at(_FOUR, batch=1)),
        "resumed": Job("chat", *_at(_FOUR, batch=1), ({"stop_after": 2}, {"resume": True})),
        "two_ranks": Job("chat", *_at(_FOUR, **_TWICE), ranks=2),
    }
)


def cases(names: Sequence[str] = ()) -> list[Case]:
    """These cases, or all without names, in the order in which they are judged."""
    found = tomllib.loads(files("favor.conform").joinpath("cases.toml").read_text("utf-8"))
    return [
        Case(name, case["holds"], case["why"], tuple(case["jobs"]), JUDGES[case["judge"]], case.get("refusal", False))
        for name, case in found.items()
        if not names or name in names
    ]


def needed(names: Sequence[str]) -> dict[str, Job]:
    """The jobs of these cases, the one that tells how a trainer scores always among them."""
    wanted = {job for case in cases(names) for job in case.jobs} | {"step"}
    return {name: job for name, job in JOBS.items() if name in wanted}
