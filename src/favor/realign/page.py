"""The page of `favor realign`: a slider over lambda, the figures and samples of where it stands, reward and accuracy against KL.

In: the content of realign.json. Out: HTML that needs no network and, without JavaScript, shows every strength one below the
other; no folder of this machine. Next: realign.html.jinja.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from favor.report.curves import Drawn
from favor.report.frame import rendered
from favor.report.plot import Axes, Line, Span, chart
from favor.report.samples import prompt_text
from favor.report.table import family_names, family_rows

# prompts that are shown, and letters of one text
_PROMPTS, _LETTERS = 8, 600
_AGAINST = {"reward": "reward of its own samples", "accuracy": "implicit reward accuracy, held-out"}


def page(figures: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> str:
    """The whole page."""
    header, rows = family_rows(figures)
    found = family_names(figures)
    shown = [
        {
            "name": name,
            "rows": [(what, cell) for what, cell in zip(header[1:], row[1:], strict=True)],
            "answers": [(_cut(prompt_text(each["prompt"])), _texts(each["answers"][i])) for each in samples[:_PROMPTS]],
        }
        for i, ((name, _), row) in enumerate(zip(found, rows, strict=True))
    ]
    strengths = [one["lambda"] for one in figures["family"]]
    values = {"header": header, "rows": rows, "family": shown[: len(strengths)], "sweep": shown[len(strengths) :]}
    drawn = [_plot(figures, key, what) for key, what in _AGAINST.items() if key in figures["family"][0]]
    at = min(range(len(strengths)), key=lambda i: abs(strengths[i] - 1))
    name = str(figures["run"]).rstrip("/").rpartition("/")[2]
    return rendered("favor.realign", "realign.html.jinja", f=figures, name=name, at=at, plots=drawn, **values)


def _plot(figures: Mapping[str, Any], key: str, what: str) -> Drawn:
    """A figure against KL: the family as one line, the runs of the sweep as points of another."""
    lines = [
        _line(figures["family"], key, "mixed at decoding", 0, [f"{one['lambda']:g}" for one in figures["family"]]),
        _line(figures["sweep"], key, "trained", 1, [f"beta {one['beta']:g}" for one in figures["sweep"]]),
    ]
    axes = Axes(f"{what} against KL", "KL to the reference, nats a response", what, 520, 320, "sqrt", inside=True)
    return Drawn(
        what, "up" if key == "reward" else "", "Numbers at the points are lambda; bars are 95 %.", chart(axes, lines)
    )


def _line(found: Sequence[Mapping[str, Any]], key: str, label: str, colour: int, texts: Sequence[str]) -> Line:
    def spans(name: str) -> list[Span]:
        return [one[f"{name}_interval"] or (one[name], one[name]) for one in found]

    return Line(
        [one["kl"] for one in found],
        [one[key] for one in found],
        label,
        colour,
        marks=True,
        joined=colour == 0,
        texts=texts,
        across=spans("kl"),
        up=spans(key),
    )


def _texts(answers: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [one | {"text": _cut(one["text"])} for one in answers["samples"]]


def _cut(text: str) -> str:
    return text if len(text) <= _LETTERS else f"{text[:_LETTERS]} ..."
