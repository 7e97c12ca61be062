"""`favor realign`: the mixed model against a slow one, both its ends exactly, what is baked, what the page shows, how it fails."""

import contextlib
import itertools
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import zoo_models
from oracles import tree
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from favor.config import load
from favor.data.batches import build
from favor.data.prompts import sample_seeds
from favor.errors import CheckpointError, ConfigError
from favor.eval.intervals import SHARE, mean_interval, sign_share
from favor.model.layout import settle
from favor.model.load import ModelConfig, make_policy
from favor.model.logprobs import response_logps, sum_tokens
from favor.model.mixed import family_kl, family_logps
from favor.model.sample import Mix, SampleConfig, sample
from favor.realign.run import RealignConfig, realign

TREES = [
    tree((5, 6, 7), [(8, 9, 10, 11, 12, 2), (8, 30, 31, 32, 33, 2), (8, 9, 40, 2)], [(0, 1), (2, 0)]),
    tree((5, 6, 70, 71), [(8, 9, 2), (80, 31, 2)], [(0, 1)], first=3),
]
WEIGHTS = (0.0, 0.3, 1.0, 1.7)
ROWS = [{"prompt": f"Film {i}?", "chosen": f"good {i} film", "rejected": f"bad {i}"} for i in range(12)]
SMALL = ("lambdas=[0, 0.5, 1, 2]", "sample_prompts=3", "samples_per_prompt=2", "sample.max_new_tokens=5")


def policy_of(seed, family="llama", **more):
    return make_policy(tiny.model(family, seed), tiny.tokenizer(), ModelConfig(path=f"model {seed}"), **more)


def both(family="llama", layout="auto"):
    """Reference and policy, settled."""
    found = [settle(policy_of(seed, family), layout, TREES)[0] for seed in (0, 1)]
    return tuple(replace(one, layout=found[0].layout) for one in found)


def logits_of(policy, ids):
    """Plain transformers, eager, one unpadded row: float32 [T, V]."""
    model = policy.causal_lm
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()
    model.set_attn_implementation(before)
    return found


def mixed_rows(reference, policy, prompt, response, weight):
    """The slow way: log-probs over the vocabulary at every token of a response, of mixture and reference: float64 [T, V] each."""
    ids = (*prompt, *response)
    ref, pi = (logits_of(one, ids)[len(prompt) - 1 : -1].double() for one in (reference, policy))
    return ((1 - weight) * ref + weight * pi).log_softmax(-1), ref.log_softmax(-1)


# --- the mixed model ---


@pytest.mark.parametrize(("family", "layout"), [("llama", "tree"), ("llama", "rows"), ("gpt2", "tree")])
@pytest.mark.parametrize("head", [True, False])
def test_log_probs_are_those_of_the_slow_way(family, layout, head):
    """On trees, on padded rows, and where a model's own head makes all logits."""
    reference, policy = both(family, layout)
    assert policy.layout == layout
    if not head:
        reference, policy = (replace(one, fast_head=None) for one in (reference, policy))
    batch = build(TREES, layout)
    logps = family_logps(reference, policy, batch, WEIGHTS)
    for weight, value_E in zip(WEIGHTS, logps, strict=True):
        kl_R = sum_tokens(batch, family_kl(reference, policy, batch, weight)).tolist()
        kl_of_policy_R = sum_tokens(batch, family_kl(reference, policy, batch, weight, policy)).tolist()
        expected, divergences, from_policy = [], [], []
        for prompt, response in ((one.prompt_ids, response) for one in TREES for response in one.response_ids):
            mixed, ref = mixed_rows(reference, policy, prompt, response, weight)
            end = mixed_rows(reference, policy, prompt, response, 1.0)[0]
            expected.append(float(mixed.gather(1, torch.tensor(response)[:, None]).sum()))
            divergences.append(float((mixed.exp() * (mixed - ref)).sum()))
            from_policy.append(float((mixed.exp() * (mixed - end)).sum()))
        assert sum_tokens(batch, value_E).tolist() == pytest.approx(expected, abs=2e-4)
        assert kl_R == pytest.approx(divergences, abs=2e-4)
        assert kl_of_policy_R == pytest.approx(from_policy, abs=2e-4)
    assert abs(expected[0] - float(sum_tokens(batch, logps[0])[0])) > 1, "the models are alike: nothing was tested"


def test_a_tile_of_one_place_gives_the_same(monkeypatch):
    reference, policy = both()
    batch = build(TREES, policy.layout)
    whole = family_logps(reference, policy, batch, WEIGHTS), family_kl(reference, policy, batch, 0.3)
    monkeypatch.setattr("favor.model.logprobs._TILE_BYTES", 1)
    cut = family_logps(reference, policy, batch, WEIGHTS), family_kl(reference, policy, batch, 0.3)
    for one, other in zip(whole, cut, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_both_ends_are_the_models_themselves():
    reference, policy = both()
    batch = build(TREES, policy.layout)
    first, last = family_logps(reference, policy, batch, (0.0, 1.0))
    lengths = batch.length_R
    for value_E, model in ((first, reference), (last, policy)):
        difference = (sum_tokens(batch, value_E) - response_logps(model, batch).detach()).abs() / lengths
        assert difference.max() < 1e-6
    assert family_kl(reference, policy, batch, 0.0).abs().max() == 0
    assert family_kl(reference, policy, batch, 1.0, policy).abs().max() == 0


def test_the_sum_over_tokens_is_the_kl_of_responses(tmp_path):
    """Every response of up to two tokens over four words, by its probability: the mean of the sums is KL(pi_w || ref) itself."""
    models = []
    for seed in (0, 1):
        tiny.save_words(tmp_path / str(seed), ["a", "b", "c"], seed)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(seed)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(12 if parameter.dim() > 1 else 1)
        words = tiny.word_tokenizer(["a", "b", "c"])
        models.append(make_policy(model, words, ModelConfig(path=str(tmp_path / str(seed)))))
    weight, prompt, end = 0.6, (3, 4), 2
    vocabulary = range(6)
    responses = [(end,), *itertools.product([v for v in vocabulary if v != end], vocabulary)]
    batch = build([tree(prompt, [one], first=i) for i, one in enumerate(responses)], "rows")
    logp_R, ref_R = (sum_tokens(batch, x) for x in family_logps(*models, batch, (weight, 0.0)))
    assert float(logp_R.exp().sum()) == pytest.approx(1, abs=1e-6)
    exact = float((logp_R.exp() * (logp_R - ref_R)).sum())
    estimate_R = sum_tokens(batch, family_kl(*models, batch, weight))
    assert float((logp_R.exp() * estimate_R).sum()) == pytest.approx(exact, abs=1e-6)
    assert exact > 0.01
    # and it varies less than log pi - log ref
    spread = [float((logp_R.exp() * (x - exact) ** 2).sum()) for x in (estimate_R, logp_R - ref_R)]
    assert spread[0] < spread[1]


# --- samples ---

PROMPTS = [tuple(20 + i for i in range(length)) for length in (9, 4, 7)]


def slow_sample(reference, policy, prompt, seed, weight, config):
    """Token by token from whole forwards of both models, without caches, by the same stream."""
    stream = torch.Generator().manual_seed(seed)
    found = []
    while len(found) < config.max_new_tokens and (not found or found[-1] not in policy.end_ids):
        ref, pi = (logits_of(one, (*prompt, *found))[-1] for one in (reference, policy))
        noise = torch.empty_like(pi).exponential_(generator=stream)
        mixed = (1 - weight) * ref + weight * pi
        found.append(int((mixed / config.temperature - noise.log()).argmax()))
    return tuple(found)


@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 1.0), (1.7, 1.0), (0.3, 1e-4)])
def test_samples_are_those_of_the_slow_way_whatever_the_batch(weight, temperature):
    """Several of one prompt, whose policy computes it once, and prompts by themselves."""
    reference, policy = both()
    config = SampleConfig(max_new_tokens=6, temperature=temperature)
    repeated, seeds = [prompt for prompt in PROMPTS for _ in range(2)], sample_seeds(0, range(3), 2)
    expected = [
        slow_sample(reference, policy, prompt, seed, weight, config)
        for prompt, seed in zip(repeated, seeds, strict=True)
    ]
    for batch in (1, 4, 99):
        wanted = config.model_copy(update={"batch": batch})
        assert sample(policy, repeated, seeds, wanted, mix=Mix(reference, weight)) == expected
    ends = [sample(one, repeated, seeds, config) for one in (reference, policy)]
    assert expected not in ends or temperature < 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba2", "openai-gpt"])
def test_the_ends_sample_what_the_models_sample(family):
    """Token for token; also of models that keep states, or nothing, and so read their past again."""
    config = ModelConfig(path=family)
    torch.manual_seed(3)
    models = [make_policy(zoo_models.build(family), tiny.tokenizer(), config, frozen=True) for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].causal_lm.parameters():
            parameter.mul_(1.5)
    repeated, seeds = [prompt for prompt in PROMPTS for _ in range(2)], sample_seeds(0, range(3), 2)
    settings = SampleConfig(max_new_tokens=6)
    ends = [sample(one, repeated, seeds, settings) for one in models]
    assert ends[0] != ends[1]
    for weight, expected in zip((0.0, 1.0), ends, strict=True):
        assert sample(models[1], repeated, seeds, settings, mix=Mix(models[0], weight)) == expected


# --- the command ---


def command(folder, *words):
    """The command line in a folder; its exit code."""
    from favor.cli import main

    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["favor", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
    return end.value.code


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A full run, one at another beta, one from another start; LoRA, rsLoRA and DoRA."""
    folder = tmp_path_factory.mktemp("realign")
    tiny.save(folder / "base")
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "r.py").write_text("def score(prompts, responses):\n    return [len(r) / 9 for r in responses]\n")
    common = ("model.path=base", "data.train=d.jsonl", "data.hold_out.share=0.4", "train.batch_prompts=4")
    full = (*common, "optim.lr=1e-2")
    lora = (*common, "optim.lr=2e-2", "model.lora.rank=4", "model.lora.alpha=8")
    assert not command(folder, "train", "run=full", *full)
    assert not command(folder, "train", "run=milder", "loss.beta=0.4", *full)
    tiny.model(seed=7).save_pretrained(folder / "other")
    tiny.tokenizer().save_pretrained(folder / "other")
    assert not command(folder, "train", "run=elsewhere", *full, "model.path=other")
    for kind in ("lora", "rslora", "dora"):
        more = [f"model.lora.{kind}=true"] if kind != "lora" else []
        assert not command(folder, "train", f"run={kind}", *lora, *more)
    return folder


def ran(folder, *words, out="out.json", page="page.html"):
    """`favor realign` as a function, in the folder: what it returns."""
    given = [f"out={out}", f"page={page}", "overwrite=true", *SMALL, *words]
    with contextlib.chdir(folder):
        return realign(load(RealignConfig, None, given), lambda text: None, lambda *_: None)


def test_figures_are_those_of_eval_at_both_ends(runs):
    """The same pairs, samples and streams as `favor eval`: 1 is the policy, 0 the reference; between them, something else."""
    drawn = ("sample_prompts=3", "samples_per_prompt=2", "sample.max_new_tokens=5")
    assert not command(runs, "eval", "run=full", *drawn)
    evaluated = json.loads((runs / "full/eval.json").read_text())
    sampled = [json.loads(line) for line in (runs / "full/samples.jsonl").read_text().splitlines()]
    figures = ran(runs, "run=full", "reward.kind=callable", "reward.path=r.py:score", "sweep=['milder']")
    start, half, whole, beyond = figures["family"]
    for name in ("accuracy", "margin", "accuracy_interval", "margin_interval"):
        assert whole[name] == pytest.approx(evaluated[name], abs=1e-5)
    assert (start["accuracy"], start["margin"], start["kl"], start["beta"]) == (0.5, 0.0, 0.0, None)
    assert [one["beta"] for one in (half, whole, beyond)] == [0.2, 0.1, 0.05]
    assert 0 < half["kl"] < whole["kl"] < beyond["kl"]
    assert (start["length"], whole["length"]) == (evaluated["length"]["reference"], evaluated["length"]["policy"])
    assert whole["ended"] == pytest.approx(evaluated["ended"]["policy"])
    content = json.loads((runs / "out.json").read_text())
    assert {name: content[name] for name in figures} == json.loads(json.dumps(figures))
    for record, mine in zip(sampled, content["samples"], strict=True):
        told = {one["of"]: [said["text"] for said in one["samples"]] for one in mine["answers"]}
        assert (told["lambda 0"], told["lambda 1"]) == (record["reference"], record["policy"])
        assert mine["prompt"] == record["prompt"]
        assert list(told)[-1] == "trained: milder"
    ends = [[one["answers"][place]["samples"] for one in content["samples"]] for place in (0, 2, 3)]
    assert all(first != second for first, second in itertools.combinations(ends, 2))
    lengths = [len(said["text"]) / 9 for one in content["samples"] for said in one["answers"][1]["samples"]]
    assert half["reward"] == pytest.approx(np.mean(lengths))
    expected = mean_interval(np.array(lengths), clusters=np.repeat(np.arange(3), 2))
    assert half["reward_interval"] == pytest.approx(expected.ends)
    for one in [*figures["family"][1:], *figures["sweep"]]:
        for name in ("accuracy", "margin", "kl", "ended", "reward"):
            low, high = one[f"{name}_interval"]
            assert low <= one[name] <= high, name
    (milder,) = figures["sweep"]
    assert (milder["beta"], milder["lambda"], milder["run"]) == (0.4, 0.25, "milder")


def test_margins_and_kl_between_are_those_of_the_slow_way(runs):
    """From the saved folders, by plain transformers, on the very rows."""
    figures = ran(runs, "run=full", "lambdas=[0.5]")
    from favor.eval.evaluate import EvalConfig, subject_of
    from favor.ranks import World
    from favor.rewards.model import read_run

    with contextlib.chdir(runs):
        subject = subject_of(EvalConfig(run="full"), read_run("full")[1], World(), lambda text: None)
    models = (subject.reference, subject.policy)
    margins = []
    for one in subject.trees:
        for comparison in one.comparisons:
            ratio = []
            for response in (one.response_ids[i] for i in comparison.order):
                mixed, ref = mixed_rows(*models, one.prompt_ids, response, 0.5)
                ratio.append(float((mixed - ref).gather(1, torch.tensor(response)[:, None]).sum()))
            margins.append(0.1 * (ratio[0] - ratio[1]))
    (half,) = figures["family"]
    assert half["margin"] == pytest.approx(np.mean(margins), abs=1e-5)
    share = mean_interval(sign_share(np.array(margins)), bounds=SHARE)
    assert half["accuracy"] == share.mean
    assert half["accuracy_interval"] == pytest.approx(share.ends)


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_a_scaled_adapter_is_base_plus_lambda_delta_in_peft(runs, kind):
    """Logits as PEFT loads it, against weights written down by hand; the gap against KL by plain transformers."""
    folder, strength = runs / f"baked-{kind}", 0.4
    figures = ran(runs, f"run={kind}", f"bake={strength}", f"bake_to={folder.name}")["baked"]
    base = AutoModelForCausalLM.from_pretrained(runs / "base", dtype=torch.float32)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, str(folder)).eval()(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(runs / "base", dtype=torch.float32).eval()
        before = plain(input_ids=ids).logits
        policy = AutoModelForCausalLM.from_pretrained(runs / "base", dtype=torch.float32)
        policy = PeftModel.from_pretrained(policy, str(runs / kind / "model")).merge_and_unload()
        for name, weight in policy.named_parameters():
            start = plain.get_parameter(name)
            start.copy_(start + strength * (weight - start))
        expected = plain(input_ids=ids).logits
    assert (adapted - expected).abs().max() < 1e-4
    assert (adapted - before).abs().max() > 1e-2
    assert (figures["kind"], figures["lambda"]) == ("adapter", strength)
    _check_gap(runs, kind, plain, strength, figures)


def _check_gap(runs, run, baked, strength, figures):
    from favor.eval.evaluate import EvalConfig, subject_of
    from favor.ranks import World
    from favor.rewards.model import read_run

    with contextlib.chdir(runs):
        subject = subject_of(EvalConfig(run=run), read_run(run)[1], World(), lambda text: None)
    other = make_policy(baked, tiny.tokenizer(), ModelConfig(path="baked"), frozen=True)
    gaps = []
    for prompt, response in ((one.prompt_ids, response) for one in subject.trees for response in one.response_ids):
        mixed, _ = mixed_rows(subject.reference, subject.policy, prompt, response, strength)
        said = logits_of(other, (*prompt, *response))[len(prompt) - 1 : -1].double().log_softmax(-1)
        gaps += (mixed.exp() * (mixed - said)).sum(-1).tolist()
    assert figures["tokens"] == len(gaps)
    assert figures["kl_per_token"] == pytest.approx(np.mean(gaps), rel=1e-2, abs=1e-7)
    assert figures["largest_kl"] == pytest.approx(max(gaps), rel=1e-2, abs=1e-7)
    low, high = figures["kl_per_token_interval"]
    assert low < figures["kl_per_token"] < high
    assert figures["largest_kl"] > 1e-6


def test_mixed_weights_load_in_transformers(runs):
    figures = ran(runs, "run=full", "bake=1.5", "bake_to=beyond")["baked"]
    models = [
        AutoModelForCausalLM.from_pretrained(runs / name, dtype=torch.float32)
        for name in ("base", "full/model", "beyond")
    ]
    start, policy, baked = (dict(model.named_parameters()) for model in models)
    for name, weight in baked.items():
        assert torch.allclose(weight, start[name] + 1.5 * (policy[name] - start[name]), atol=1e-6)
    assert (runs / "beyond/tokenizer.json").exists()
    assert figures["kind"] == "weights"
    _check_gap(runs, "full", models[2], 1.5, figures)
    assert not command(runs, "eval", "run=full", "reference=beyond", "sample_prompts=0")


@pytest.mark.parametrize("run", ["full", "lora"])
def test_baked_at_one_is_the_policy_itself(runs, run):
    assert abs(ran(runs, f"run={run}", "bake=1", f"bake_to=one-{run}")["baked"]["largest_kl"]) < 1e-6


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (["run=dora", "bake=0.5", "bake_to=x"], ConfigError, r"also has DoRA's lengths of columns .*lora_magnitude"),
        (["run=full", "bake=0.5", "bake_to=base"], ConfigError, "bake_to=base: is there already"),
        (["run=full", "bake=0.5", "bake_to=no/x"], ConfigError, "no is no folder"),
        (["run=full", "bake=0.5"], ConfigError, "bake and bake_to go together"),
        (["run=full", "bake_to=x"], ConfigError, "bake and bake_to go together"),
        (["run=full", "lambdas=[1, 0.5, 1]"], ConfigError, "lambdas holds a value twice"),
        (["run=full", "lambdas=[]"], ConfigError, "lambdas"),
        (["run=full", "lambdas=[-1]"], ConfigError, "greater than or equal to 0"),
        (["run=full", "sample.temperature=0.7"], ConfigError, "sample.temperature must stay 1"),
        (["run=base"], CheckpointError, "base: no finished run here"),
        (["run=full", "sweep=['nowhere']"], CheckpointError, "nowhere: no finished run here"),
        (["run=full", "sweep=['elsewhere']"], ConfigError, "sweep: elsewhere began at another model"),
        (["run=full", "out=page.html"], ConfigError, "page.html is written for out"),
        (["run=full", "out=full/config.toml"], ConfigError, "is the file it reads"),
        (["run=full", "out=full/model/x.json"], ConfigError, "lies in the folder it reads"),
        (["run=full", "out=d.jsonl", "data=d.jsonl"], ConfigError, "is the file it reads"),
    ],
)
def test_what_cannot_work_is_refused(runs, words, error, said):
    before = {path for path in runs.rglob("*") if ".lock" not in path.name}
    with pytest.raises(error, match=said):
        ran(runs, *words)
    assert {path for path in runs.rglob("*") if ".lock" not in path.name} <= before


def test_weights_kept_whole_beside_an_adapter_are_refused(runs, tmp_path):
    from favor.realign.bake import check_bakeable

    held = load_file(runs / "lora/model/adapter_model.safetensors")
    save_file(held | {"base_model.model.score.weight": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"weights kept whole \(base_model.model.score.weight\)"):
        check_bakeable(tmp_path, tmp_path / "out")


def test_overwrite_alone_is_refused_and_files_of_others_stay(runs):
    with pytest.raises(ConfigError, match="overwrite is read only with out or page"):
        load(RealignConfig, None, ["run=full", "overwrite=true"])
    (runs / "mine.json").write_text("mine")
    with contextlib.chdir(runs), pytest.raises(ConfigError, match="is there already"):
        realign(load(RealignConfig, None, ["run=full", "out=mine.json", *SMALL]), lambda text: None, lambda *_: None)
    assert (runs / "mine.json").read_text() == "mine"


def test_the_command_and_its_page(runs, capsys):
    words = ("realign", "run=full", *SMALL, "sweep=['milder']", "bake=0.5", "bake_to=half")
    assert not command(runs, *words)
    out = capsys.readouterr().out
    assert "KL 0.00 to" in out
    assert re.search(r"lambda 0\.5 baked into half: \S+ nats a token from the exact family \(KL\), \S+ at most", out)
    assert "next: favor sample model=half prompts=FILE out=samples.jsonl" in out
    figures = json.loads((runs / "full/realign.json").read_text())
    page = (runs / "full/realign.html").read_text()
    assert page.count('<article class="strength"') == 4
    # without JavaScript everything stands: nothing but the slider is hidden
    assert re.findall(r"<(\w+)[^>]* hidden[ >]", page) == ["div"]
    assert '<input type="range" id="lambda" min="0" max="3" step="1" value="2">' in page
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", page)
    assert str(runs) not in page
    for one in [*figures["family"], *figures["sweep"]]:
        assert page.count(f"{one['kl']:.2f} [") >= 2 or one["kl"] == 0
    svg = page[page.index('<section id="plots">') :]
    assert svg.count("<circle") == 5
    assert f"{figures['baked']['kl_per_token']:.3g} nats a token" in page
    # again, over its own files
    assert not command(runs, "realign", "run=full", *SMALL, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["figures"]["family"] == figures["family"]
    assert told["paths"] == {"figures": "full/realign.json", "page": "full/realign.html"}
    assert told["next"] == ["favor realign run=full bake=2 bake_to=FOLDER"]


def a_page(text, prompts=1):
    """A page of three strengths and a run beside, whose every prompt and sample is this text."""
    from favor.realign.page import page

    names = ("accuracy", "margin", "kl", "length", "ended", "reward")
    family = [
        {"lambda": x, "beta": 0.1 / x if x else None}
        | dict.fromkeys(names, x / 4)
        | {f"{name}_interval": (x / 5, x / 3) if x else None for name in names}
        for x in (0.0, 1.0, 2.0)
    ]
    figures = {
        "run": "/home/me/<b>run",
        "beta": 0.1,
        "pairs": 9,
        "prompts": 9,
        "sampled_prompts": 4,
        "reward": "callable r",
    }
    baked = {
        "lambda": 0.5,
        "kind": "weights",
        "tokens": 9,
        "kl_per_token": 0.001,
        "largest_kl": 0.1,
        "folder": "/home/me/x",
    }
    figures |= {"max_new_tokens": 4, "family": family, "baked": baked}
    figures["sweep"] = [family[1] | {"run": "/home/me/other", "beta": 0.2, "lambda": 0.5}]
    said = [{"of": "x", "samples": [{"text": text, "cut": True, "score": 0.25}]}] * 4
    return page(figures, [{"prompt": [{"role": "user", "content": text}], "answers": said}] * prompts)


def test_texts_on_the_page_are_escaped_and_short():
    evil = "<script>alert(1)</script>" + "x" * 2000
    text = a_page(evil)
    assert evil[:25] not in text
    assert "/home/me" not in text
    # prompt and sample of four members
    assert text.count("&lt;script&gt;alert(1)") == 8
    assert "<h1>favor realign: &lt;b&gt;run</h1>" in text
    assert "x" * 601 not in text
    assert text.count('<span class="score">0.25</span>') == 4
    assert text.count("<circle") == 8
    assert a_page("short", prompts=30).count("<h3>short</h3>") == 8 * 4


@pytest.mark.slow
def test_the_slider_shows_one_strength_at_a_time(tmp_path):
    from page_desk import browser, listened

    (tmp_path / "page.html").write_text(a_page("words"))
    with browser() as opened:
        said = []
        page = listened(opened, (tmp_path / "page.html").as_uri(), said)
        shown = page.locator("article.strength:visible > h2")
        assert shown.all_inner_texts() == ["lambda 1"]
        page.locator("#lambda").fill("2")
        assert shown.all_inner_texts() == ["lambda 2"]
        assert page.inner_text("#said") == "lambda 2"
        assert page.locator("#plots circle[r='6']").count() == 2
        assert said == []
