"""The loss family written again, item by item in scalars, from the papers' equations: what the fast code is held against.

Every loss gets the log-probs of each response's tokens under policy and reference and the judgments of an optimizer
batch; it returns the weighted mean over its items, as a scalar that carries a graph.
"""

import math
from dataclasses import dataclass, field

import torch


@dataclass
class Judged:
    """Judgments by response number over a whole optimizer batch. tokens_pi, tokens_ref: list of 1-D tensors."""

    tokens_pi: list
    tokens_ref: list
    pairs: list = field(default_factory=list)  # (chosen, rejected, weight, margin, label)
    rankings: list = field(default_factory=list)  # (order, scores or None, weight)
    ties: list = field(default_factory=list)  # (a, b, weight)
    thumbs: list = field(default_factory=list)  # (response, good, weight)
    zero: float = 0.0
    overlap: list = field(default_factory=list)

    def pi(self, i):
        return self.tokens_pi[i].sum()

    def ref(self, i):
        return self.tokens_ref[i].sum()

    def length(self, i):
        return len(self.tokens_pi[i])


def s(x):
    return 1 / (1 + torch.exp(-x))


def transformed(judged, i, options):
    """f'(pi/ref) with the options that change it."""
    log = judged.pi(i) - judged.ref(i)
    if options.get("length_normalized"):
        log = log / judged.length(i)
    divergence = options.get("divergence", {"kind": "reverse_kl"})
    u, kind = torch.exp(log), divergence["kind"]
    if kind == "forward_kl":
        return -1 / u
    if kind == "jensen_shannon":
        return torch.log(2 * u / (1 + u))
    if kind == "alpha":
        a = divergence.get("alpha", 0.5)
        return (1 - u ** (-a)) / a
    return log


def sides(judged, w, l, options):
    if options.get("ld_alpha") is not None:
        public = min(judged.length(w), judged.length(l))

        def part(i):
            head = judged.tokens_pi[i][:public].sum() - judged.tokens_ref[i][:public].sum()
            tail = judged.tokens_pi[i][public:].sum() - judged.tokens_ref[i][public:].sum()
            return head + options["ld_alpha"] * tail

        return part(w), part(l)
    return transformed(judged, w, options), transformed(judged, l, options)


def of_gap(name, h, margin, label, options):
    beta, e = options.get("beta", 0.1), options.get("label_smoothing", 0.1)
    if name == "dpo":
        return -label * torch.log(s(beta * h)) - (1 - label) * torch.log(s(-beta * h))
    if name == "cdpo":
        return -(1 - e) * torch.log(s(beta * h)) - e * torch.log(s(-beta * h))
    if name == "robust":
        return (-(1 - e) * torch.log(s(beta * h)) + e * torch.log(s(-beta * h))) / (1 - 2 * e)
    if name == "hinge":
        return torch.relu(1 - beta * h)
    if name == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if name == "exo":
        p = s(beta * h)
        return p * torch.log(p / (1 - e)) + (1 - p) * torch.log((1 - p) / e)
    if name == "discopop":
        m = s(beta * h / options.get("discopop_tau", 0.05))
        return (1 - m) * -torch.log(s(beta * h)) + m * torch.exp(-beta * h)
    if name == "odpo":
        offset = margin if options.get("offset") == "linear" else math.log(margin)
        return -torch.log(s(beta * h - options.get("offset_scale", 1.0) * offset))
    raise KeyError(name)


def of_sides(name, w, l, options):
    beta = options.get("beta", 0.1)
    half = 1 / (2 * beta)
    return {
        "dpop": lambda: -torch.log(s(beta * (w - l - options.get("dpop_lambda", 50.0) * torch.relu(-w)))),
        "sppo_hard": lambda: (w - half) ** 2 + (l + half) ** 2,
        "apo_zero": lambda: 1 - s(beta * w) + s(beta * l),
        "apo_down": lambda: s(beta * w) + 1 - s(beta * (w - l)),
        "preferred_ft": lambda: -w,
        "unlikelihood": lambda: -w + options.get("alpha", 0.5) * l,
    }[name]()


def of_likelihoods(name, judged, w, l, options):
    beta = options.get("beta", 0.1)
    mean_w, mean_l = judged.pi(w) / judged.length(w), judged.pi(l) / judged.length(l)
    if name == "simpo":
        return -torch.log(s(beta * mean_w - beta * mean_l - options.get("gamma", 0.5)))
    if name == "cpo":
        preference = -torch.log(s(beta * (judged.pi(w) - judged.pi(l))))
        return preference - options.get("nll_weight", 1.0) * judged.pi(w)
    if name == "orpo":
        odds_w, odds_l = (torch.exp(m) / (1 - torch.exp(m)) for m in (mean_w, mean_l))
        return -mean_w - beta * torch.log(s(torch.log(odds_w / odds_l)))
    if name == "sft":
        return -mean_w
    raise KeyError(name)


def trust(judged, w, l, options):
    """WPO's weight, a constant."""
    kind = options.get("wpo", "off")
    if kind == "off":
        return 1.0
    total = 0.0
    for i in (w, l):
        mean = judged.pi(i).item() / judged.length(i)
        total += mean - (judged.overlap[i] if kind == "aligned" else 0.0)
    return min(1.0, math.exp(total))


def of_ties(name, judged, options):
    """(loss, weight) of wins and ties."""
    beta, found = options.get("beta", 0.1), []
    for a, b, weight, tied in [(w, l, k, False) for w, l, k, *_ in judged.pairs] + [(*t, True) for t in judged.ties]:
        d = beta * (transformed(judged, a, options) - transformed(judged, b, options))
        if name == "rao_kupper":
            theta = math.exp(options.get("tie_width", 0.5))
            win, lose = 1 / (1 + theta * torch.exp(-d)), 1 / (1 + theta * torch.exp(d))
            p = 1 - win - lose if tied else win
        else:
            nu = options.get("tie_nu", 1.0)
            strength_a, strength_b = torch.exp(d), torch.ones(())
            middle = nu * torch.sqrt(strength_a * strength_b)
            p = (middle if tied else strength_a) / (strength_a + strength_b + middle)
        found.append((-torch.log(p) * (1.0 if tied else trust(judged, a, b, options)), weight))
    return found


def of_rankings(name, judged, options):
    beta, found = options.get("beta", 0.1), []
    for order, scores, weight in judged.rankings:
        r = [beta * transformed(judged, i, options) for i in order]
        if name == "plackett_luce":
            stages = options.get("top_k") or len(order)
            p = torch.ones((), dtype=torch.float64)
            for k in range(min(stages, len(order))):
                p = p * torch.exp(r[k]) / sum(torch.exp(x) for x in r[k:])
            found.append((-torch.log(p), weight))
            continue
        if scores is None:
            share = [1.0] + [0.0] * (len(order) - 1)
        else:
            exps = [math.exp((x - max(scores)) / options.get("score_temperature", 1.0)) for x in scores]
            share = [x / sum(exps) for x in exps]
        value = sum(share[k] * torch.log(s(r[k])) + torch.log(s(-r[k])) / len(order) for k in range(len(order)))
        found.append((-value, weight))
    return found


def all_thumbs(judged):
    implied = [(w, True, k) for w, _, k, *_ in judged.pairs] + [(l, False, k) for _, l, k, *_ in judged.pairs]
    return judged.thumbs + implied


def of_thumbs(name, judged, options):
    beta, thumbs = options.get("beta", 0.1), all_thumbs(judged)
    r = [judged.pi(i) - judged.ref(i) for i, *_ in thumbs]
    if name == "kto":
        good, bad = options.get("desirable_weight", 1.0), options.get("undesirable_weight", 1.0)
        return [
            (good * (1 - s(beta * (x - judged.zero))) if up else bad * (1 - s(beta * (judged.zero - x))), weight)
            for x, (_, up, weight) in zip(r, thumbs, strict=True)
        ]
    means = []
    for side in (True, False):
        mine = [(beta * x.item(), w) for x, (_, up, w) in zip(r, thumbs, strict=True) if up is side]
        means.append(sum(x * w for x, w in mine) / sum(w for _, w in mine))
    shift = sum(means) / 2
    return [
        (-torch.log(s(beta * x - shift if up else shift - beta * x)), weight)
        for x, (_, up, weight) in zip(r, thumbs, strict=True)
    ]


def quantiles(entries):
    """Every unit of weight (here whole numbers) as an entry of its own, sorted by value."""
    spread = [value for value, weight in entries for _ in range(round(weight))]
    return sorted(spread, key=lambda value: value.item())


def of_batch(name, judged, options):
    """AOT: sorted against sorted. Unequal sizes are brought to a common multiple."""
    beta = options.get("beta", 0.1)
    if name == "aot":
        upper = [(judged.pi(w) - judged.pi(l), k) for w, l, k, *_ in judged.pairs]
        lower = [(judged.ref(w) - judged.ref(l), k) for w, l, k, *_ in judged.pairs]
    else:
        ratio = [(judged.pi(i) - judged.ref(i), up, k) for i, up, k in all_thumbs(judged)]
        upper, lower = [(x, k) for x, up, k in ratio if up], [(x, k) for x, up, k in ratio if not up]
    a, b = quantiles(upper), quantiles(lower)
    common = math.lcm(len(a), len(b))
    a = [x for x in a for _ in range(common // len(a))]
    b = [x for x in b for _ in range(common // len(b))]
    return [(-torch.log(s(beta * (x - y))), 1.0) for x, y in zip(a, b, strict=True)]


GAP = ("dpo", "cdpo", "robust", "hinge", "ipo", "exo", "discopop", "odpo")
SIDES = ("dpop", "sppo_hard", "apo_zero", "apo_down", "preferred_ft", "unlikelihood")
FREE = ("simpo", "cpo", "orpo", "sft")
TIES, RANKINGS, THUMBS, BATCH = (
    ("rao_kupper", "davidson"),
    ("plackett_luce", "nca"),
    ("kto", "bco"),
    ("aot", "aot_unpaired"),
)
NAMES = (*GAP, *SIDES, *FREE, *TIES, *RANKINGS, *THUMBS, *BATCH)


def items(name, judged, options):
    if name in TIES:
        return of_ties(name, judged, options)
    if name in RANKINGS:
        return of_rankings(name, judged, options)
    if name in THUMBS:
        return of_thumbs(name, judged, options)
    if name in BATCH:
        return of_batch(name, judged, options)
    found = []
    for w, l, weight, margin, label in judged.pairs:
        if name in FREE:
            item = of_likelihoods(name, judged, w, l, options)
        elif name in SIDES:
            item = of_sides(name, *sides(judged, w, l, options), options)
        else:
            chosen, rejected = sides(judged, w, l, options)
            item = of_gap(name, chosen - rejected, margin, label, options)
        found.append((item * trust(judged, w, l, options), weight))
    return found


def loss(config, judged):
    """The weighted sum over terms of each term's weighted mean over its items. config: the section [loss] as a dict."""
    total = 0.0
    for term in config.get("terms", [config]):
        found = items(term["kind"], judged, term)
        mean = sum(item * weight for item, weight in found) / sum(weight for _, weight in found)
        total = total + term.get("weight", 1.0) * mean
    return total
