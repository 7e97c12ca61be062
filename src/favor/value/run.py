"""`favor value`: what each pair is worth to a model, how many labels are wrong, which; and a copy without them.

In: ValueConfig. Out: figures; a line a pair, a page, a cleaned copy. Next: settings.py.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from favor import output
from favor.data.read import splits_of
from favor.data.settings import SourceConfig
from favor.data.types import Comparison, TokenTree
from favor.errors import DataError
from favor.eval.intervals import SHARE, mean_interval, sign_share
from favor.output import Output
from favor.run import jsonl
from favor.value.cheap import Array, Cases, Margins, head, margins
from favor.value.clean import cleaned
from favor.value.gradients import cosines
from favor.value.implicit import implicit_margins
from favor.value.noise import Noise, beside_trusted, mixture
from favor.value.page import page
from favor.value.pairs import How, Pair, Part, parts, read_rows
from favor.value.settings import ValueConfig
from favor.value.verdict import VERDICTS, Judged, judge

Progress: TypeAlias = Callable[[str, int, int], None]
# shares of the pairs that the curve keeps; how often as many are drawn by chance
_KEPT, _DRAWN = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5), 10
# fewer prompts say nothing
_LEAST = 20


def value(config: ValueConfig, progress: Progress, recipe: Path | None = None) -> dict[str, Any]:
    """Write what was asked for and return the figures. recipe: where the settings come from.

    Raises DataError, ConfigError or CheckpointError when something cannot be used.
    """
    settings = config.value
    asked = {"value.out": settings.out, "value.page": settings.page, "value.clean": settings.clean}
    outputs = [Output(Path(path), key, settings.overwrite) for key, path in asked.items() if path is not None]
    read = [*(source.path for source in config.data.parts), config.data.eval, settings.trusted, config.model.path]
    read += settings.policies
    with output.all_claimed(outputs, [*read, recipe and str(recipe)]):
        found = read_parts(config, progress)
        mine, trusted = found["train"], found.get("trusted")
        _check(config, found)
        others = trusted.cases if trusted else mine.cases.some(np.arange(0))
        said = margins(mine.cases, others.gap_PF, settings.models, settings.folds, config.seed, others.prompt_P)
        noise = _noise(mine, trusted, said)
        verdicts = judge(noise.wrong(said.out_MP.mean(0)), said.out_MP, settings)
        more = _more(config, mine, trusted, said, progress)
        curve = _curve(mine.cases, verdicts, found["eval"].cases, said.strength, config.seed) if "eval" in found else []
        figures = _figures(mine, said, noise, verdicts) | {"curve": curve}
        texts = {
            "value.out": lambda: jsonl(_lines(mine.pairs, verdicts, more)),
            "value.clean": lambda: jsonl(cleaned(mine.pairs, verdicts)),
            "value.page": lambda: page(config, figures, list(zip(mine.pairs, verdicts, strict=True))),
        }
        # only when all is made
        for out in outputs:
            output.write(out, {out.path: texts[out.key]()}, None)
    return figures


def read_parts(config: ValueConfig, progress: Progress) -> dict[str, Part]:
    """Parts "train", and where the recipe has them "eval" and "trusted". Raises as `value` does."""
    data, trusted = config.data, config.value.trusted
    rows = {spec.name: list(read_rows(spec.sources, spec.half, data)) for spec in splits_of(data)}
    if trusted is not None:
        rows["trusted"] = list(read_rows([SourceConfig(path=trusted)], "all", data))
    how = How(config.model, config.tokens, data.bad_rows, config.value.max_tokens_per_pack)
    return parts(rows, how, progress)


def _check(config: ValueConfig, found: Mapping[str, Part]) -> None:
    for name, part in found.items():
        prompts = len(np.unique(part.cases.prompt_P))
        if prompts < _LEAST:
            where = config.value.trusted if name == "trusted" else config.data.training
            raise DataError(
                f"{where}: {prompts} prompts with a pair ({name}), and fewer than {_LEAST} say nothing about labels; "
                "give more pairs"
            )


def _noise(mine: Part, trusted: Part | None, said: Margins) -> Noise:
    prompt_P = mine.cases.prompt_P
    if trusted is None:
        return mixture(said.out_MP, prompt_P)
    return beside_trusted(said.out_MP, prompt_P, said.other_HT, trusted.cases.prompt_P)


def _more(
    config: ValueConfig, mine: Part, trusted: Part | None, said: Margins, progress: Progress
) -> dict[str, list[float]]:
    """What else is told of every pair, by name."""
    found = {"logp_gap": mine.logp_gap_P.tolist()}
    if trusted is not None:
        # LossDiff of arXiv 2510.13212, by heads: the loss under these labels less that under the trusted ones
        by_trusted_P = head(trusted.cases, said.strength)(mine.cases.gap_PF)
        found["loss_gap"] = (np.logaddexp(0, -said.out_MP.mean(0)) - np.logaddexp(0, -by_trusted_P)).tolist()
    if config.value.policies:
        runs, budget = config.value.policies, config.value.max_tokens_per_pack
        mean_P, spread_P = implicit_margins(config.model, runs, mine.pairs, budget, partial(progress, "policies"))
        found |= {"implicit": mean_P.tolist(), "implicit_spread": spread_P.tolist()}
    if trusted is not None and config.value.gradients:
        ours, theirs = ([_alone(pair) for pair in part.pairs] for part in (mine, trusted))
        found["gradient"] = cosines(
            config.model, ours, theirs, config.seed, lambda done: progress("gradients", done, len(ours))
        )
    return found


def _alone(pair: Pair) -> TokenTree:
    """The pair as a tree of its own, the preferred response first."""
    both = (pair.chosen, pair.rejected)
    return replace(
        pair.ids,
        response_ids=tuple(pair.ids.response_ids[i] for i in both),
        complete=tuple(pair.ids.complete[i] for i in both),
        comparisons=(Comparison((0, 1)),),
        ties=(),
        thumbs=(),
    )


def _curve(mine: Cases, verdicts: Sequence[Judged], held: Cases, strength: float, seed: int) -> list[dict[str, Any]]:
    """Held-out accuracy of a cheap model fitted again to the pairs that are worth most, and to as many drawn by chance."""
    worth_P = np.array([one.worth for one in verdicts])
    # of pairs of one worth the ones with the larger margin first
    best = np.lexsort((-np.array([one.margin for one in verdicts]), -worth_P))
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for share in _KEPT:
        count = max(1, round(share * len(best)))
        drawn = [rng.permutation(len(best))[:count] for _ in range(_DRAWN)]
        chance = [sign_share(head(mine.some(some), strength)(held.gap_PF)).mean() for some in drawn]
        found = _accuracy(head(mine.some(best[:count]), strength)(held.gap_PF), held)
        rows.append({"share": share, **found, "by_chance": float(np.mean(chance))})
    sign_P = np.where([one.verdict == "flip" for one in verdicts], -1.0, 1.0)
    used = np.array([one.verdict in ("keep", "flip") for one in verdicts])
    cleaned = mine._replace(gap_PF=mine.gap_PF * sign_P[:, None]).some(used)
    return [
        *rows,
        {"share": "cleaned", **_accuracy(head(cleaned, strength)(held.gap_PF), held), "by_chance": None},
    ]


def _accuracy(margin_P: Array, held: Cases) -> dict[str, object]:
    return mean_interval(sign_share(margin_P), clusters=held.prompt_P, bounds=SHARE).named("accuracy")


def _figures(mine: Part, said: Margins, noise: Noise, verdicts: Sequence[Judged]) -> dict[str, Any]:
    """What JSON and page tell of the whole file."""
    margin_P = said.out_MP.mean(0)
    counts = Counter(one.verdict for one in verdicts)
    agree = mean_interval(sign_share(margin_P), clusters=mine.cases.prompt_P, bounds=SHARE)
    known = mean_interval(sign_share(mine.logp_gap_P), clusters=mine.cases.prompt_P, bounds=SHARE)
    return {
        "pairs": len(margin_P),
        "prompts": len(np.unique(mine.cases.prompt_P)),
        "left_out": mine.left_out,
        "wrong_labels": noise.share,
        "wrong_labels_interval": (noise.low, noise.high),
        "measured_by": noise.how,
        "label_smoothing": round(noise.certain, 3),
        **agree.named("agreement"),
        **known.named("logp_agreement"),
        "verdicts": {name: counts[name] for name in VERDICTS},
    }


def _lines(
    pairs: Sequence[Pair], verdicts: Sequence[Judged], more: Mapping[str, list[float]]
) -> Iterator[dict[str, Any]]:
    for place, (pair, one) in enumerate(zip(pairs, verdicts, strict=True)):
        responses = pair.text.responses
        yield {
            "source": pair.text.source,
            "row": pair.text.rows[0],
            **one.as_json(),
            **{name: values[place] for name, values in more.items()},
            "prompt": pair.text.prompt,
            "chosen": responses[pair.chosen],
            "rejected": responses[pair.rejected],
        }
