"""Which pair somebody sees next: gold now and then, else the one whose answer is least certain.

In: the store, a person. Out: the number of a pair, and which of its answers stands left. Next: server.py.
"""

import random
from collections import Counter
from collections.abc import Sequence

from favor.label import ability, store
from favor.label.agreement import Golds, as_numbers
from favor.label.settings import LabelConfig
from favor.label.store import Db, Vote

# enough to tell pairs apart while somebody waits
_ROUNDS = 30
# after so many seconds without a vote, somebody who has a pair before them is taken to have left
_GONE = 600


def next_pair(db: Db, person: int, config: LabelConfig) -> tuple[int, bool] | None:
    """(pair, swapped) that is before a person: the open one, or a new one that is remembered as shown; None at the end.

    Never a pair that they voted on or skipped. Gold comes in `gold_share` of the places; seed, person and count decide
    where. Else the pair whose posterior has the largest entropy: as a rule one without votes before one with a vote, and one
    whose votes differ before one whose votes agree.
    """
    if (found := store.open_pair(db, person)) is not None:
        return found
    golds, votes = store.golds(db), store.votes(db)
    met = {vote.pair for vote in votes if vote.annotator == person}
    chance = random.Random(f"{config.seed} {person} {len(met)}")
    golden = [pair for pair, known in golds.items() if known and pair not in met]
    plain = [pair for pair, known in golds.items() if not known]
    wanted = _wanted(db, person, config, [pair for pair in plain if pair not in met], votes)
    if golden and (not plain or (wanted and chance.random() < config.gold_share)):
        chosen = chance.choice(golden)
    elif wanted:
        chosen = chance.choice(_least_certain(db, golds, votes, wanted))
    else:
        return None
    swapped = chance.random() < 0.5
    store.show(db, chosen, person, swapped=swapped)
    return chosen, swapped


def num_left(db: Db, person: int, config: LabelConfig) -> int:
    """How many pairs still need a person's vote, the one before them too. Gold counts where there is nothing else."""
    golds, votes = store.golds(db), store.votes(db)
    met = {vote.pair for vote in votes if vote.annotator == person}
    count = Counter(vote.pair for vote in votes if vote.verdict != "skip")
    plain = [pair for pair, known in golds.items() if not known]
    if not plain:
        return len(golds.keys() - met)
    return sum(pair not in met and count[pair] < config.votes_per_pair for pair in plain)


def _wanted(db: Db, person: int, config: LabelConfig, pairs: Sequence[int], votes: Sequence[Vote]) -> list[int]:
    """Pairs that want more votes; those that others look at now count as voted, and come only if there are no others."""
    count = Counter(vote.pair for vote in votes if vote.verdict != "skip")
    busy = Counter(store.open_since(db, person, _GONE))
    free = [pair for pair in pairs if count[pair] + busy[pair] < config.votes_per_pair]
    return [pair for pair in free if not busy[pair]] or free


def _least_certain(db: Db, golds: Golds, votes: Sequence[Vote], wanted: Sequence[int]) -> list[int]:
    said = [vote for vote in votes if vote.verdict != "skip"]
    voted: Golds = {pair: golds[pair] for pair in sorted({vote.pair for vote in said})}
    fitted = ability.fit(as_numbers(voted, store.names(db), said), _ROUNDS)
    entropy = dict(zip(voted, fitted.entropy, strict=True))
    # rounded, so that equals are equal and chance decides among them
    found = {pair: round(entropy.get(pair, fitted.unvoted), 9) for pair in wanted}
    most = max(found.values())
    return [pair for pair in wanted if found[pair] == most]
