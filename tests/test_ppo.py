"""PPO by closed forms, slow oracles, and a bandit whose optimum is known."""

import json
import math

import pytest
import tiny
import torch
from oracles import tree
from rich.console import Console

from favor.config import load
from favor.data import batches
from favor.errors import ConfigError, DataError, NumericsError
from favor.losses import ppo
from favor.model.heads import logps_and_values, make_critic
from favor.model.load import ModelConfig, load_policy
from favor.model.logprobs import scored_logps
from favor.model.sample import SampleConfig
from favor.ranks import World
from favor.run import RunFolder, read_jsonl
from favor.stop import StoppedError, StopRequest
from favor.train.ppo import FixedKl, PpoConfig, PpoSettings, Rloo, make_objective, make_targets, train_ppo
from favor.train.preference import TrainConfig, train
from favor.train.rollout import Models, Prompt, collect
from favor.train.session import Session
from favor.words import expanded


def open_session(root, stop=None):
    return Session(RunFolder(root), World(), Console(quiet=True), stop or StopRequest())


# closed forms


def test_kl_estimators_on_worked_example_one():
    pi, ref = torch.tensor([0.6, 0.4], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)
    ratio = (pi / ref).log()
    torch.testing.assert_close(
        ppo.k1(ratio), torch.tensor([0.182322, -0.223144], dtype=torch.float64), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        ppo.k2(ratio), torch.tensor([0.016621, 0.024897], dtype=torch.float64), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        ppo.k3(ratio), torch.tensor([0.015655, 0.026856], dtype=torch.float64), atol=1e-6, rtol=0
    )
    exact = float((pi * ratio).sum())
    assert float((pi * ppo.k1(ratio)).sum()) == pytest.approx(exact, abs=1e-12)
    assert float((pi * ppo.k3(ratio)).sum()) == pytest.approx(exact, abs=1e-12)
    assert float((pi * ppo.k2(ratio)).sum()) == pytest.approx(exact, rel=0.02)


def test_k3_is_never_negative_and_all_vanish_at_the_reference():
    ratio = torch.linspace(-5, 5, 101, dtype=torch.float64)
    assert (ppo.k3(ratio) >= 0).all()
    for estimator in ppo.KL_ESTIMATORS.values():
        assert float(estimator(torch.zeros(1))) == 0.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 1.0, -1.2, 0.0),
        (0.5, 1.0, -0.5, -0.5),
        (1.5, -1.0, 1.5, 1.5),
        (0.5, -1.0, 0.8, 0.0),
        (1.1, 2.0, -2.2, -2.2),
    ],
)
def test_policy_loss_is_clipped_on_the_far_side_only(ratio, advantage, loss, gradient):
    logp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    value = ppo.policy_loss(
        logp, torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64), 0.2
    )
    assert float(value.detach()) == pytest.approx(loss)
    assert float(torch.autograd.grad(value.sum(), logp)[0]) == pytest.approx(gradient)


def test_value_loss_takes_the_worse_of_the_two():
    value, old = torch.tensor([1.0, 0.1]), torch.tensor([0.0, 0.0])
    # clipped to 0.2: (0.2 - 1)^2 / 2 = 0.32 > 0; unclipped within: (0.1 - 1)^2 / 2
    torch.testing.assert_close(ppo.value_loss(value, old, torch.ones(2), 0.2), torch.tensor([0.32, 0.405]))


@pytest.mark.parametrize(("kl", "expected"), [(6.0, 0.1), (12.0, 0.102), (100.0, 0.102), (0.0, 0.098), (6.6, 0.101)])
def test_adaptive_coefficient(kl, expected):
    assert ppo.adapted_kl_coef(0.1, kl, 6.0, 100, 1000) == pytest.approx(expected)


def test_whiten():
    values, mask = (
        torch.tensor([[1.0, 3.0, 9.0], [5.0, 7.0, 0.0]]),
        torch.tensor([[True, True, False], [True, True, False]]),
    )
    shifted, scaled = ppo.whiten(values, mask, shift=True), ppo.whiten(values, mask, shift=False)
    assert float(shifted[mask].mean()) == pytest.approx(0, abs=1e-6)
    assert float(scaled[mask].mean()) == pytest.approx(4.0, abs=1e-6)
    for out in (shifted, scaled):
        assert float(out[mask].std(unbiased=False)) == pytest.approx(1.0, abs=1e-6)
        assert not out[~mask].any()


# slow oracles


def test_gae_and_token_rewards_against_python_loops():
    generator = torch.Generator().manual_seed(1)
    lengths, width, gamma, lam = [5, 1, 3], 5, 0.9, 0.8
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    kl, value = (torch.randn(3, width, generator=generator, dtype=torch.float64) for _ in range(2))
    score = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    reward = ppo.token_rewards(score, kl, mask, 0.3)
    advantage, returns = ppo.gae(reward, value, mask, gamma, lam)
    for r, length in enumerate(lengths):
        rewards = [-0.3 * float(kl[r, t]) + (float(score[r]) if t == length - 1 else 0.0) for t in range(length)]
        values = [float(value[r, t]) for t in range(length)] + [0.0]
        deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(length)]
        for t in range(width):
            expected = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
            assert float(advantage[r, t]) == pytest.approx(expected, abs=1e-12)
            assert float(returns[r, t]) == pytest.approx(expected + values[t] if t < length else 0.0, abs=1e-12)
    assert float(reward.sum()) == pytest.approx(float(score.sum() - 0.3 * kl[mask].sum()))


def test_gae_with_lambda_one_is_the_return_less_the_value():
    reward, mask = torch.tensor([[0.0, 0.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool)
    advantage, returns = ppo.gae(reward, torch.tensor([[1.0, 2.0, 3.0]]), mask, 1.0, 1.0)
    torch.testing.assert_close(advantage, torch.tensor([[3.0, 2.0, 1.0]]))
    torch.testing.assert_close(returns, torch.full((1, 3), 4.0))


def test_group_advantages_against_python_loops():
    returns, group = torch.tensor([1.0, 2.0, 6.0, 0.0, 4.0], dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1])
    rloo, grpo = ppo.group_advantage(returns, group, "rloo"), ppo.group_advantage(returns, group, "grpo")
    for i in range(5):
        others = [float(returns[j]) for j in range(5) if group[j] == group[i] and j != i]
        assert float(rloo[i]) == pytest.approx(float(returns[i]) - sum(others) / len(others))
    assert grpo[:3].tolist() == pytest.approx(
        [-2 / (math.sqrt(7) + 1e-4), -1 / (math.sqrt(7) + 1e-4), 3 / (math.sqrt(7) + 1e-4)]
    )


# rollouts and updates on a tiny model


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("ppo") / "model")


def actors_of(folder, **settings):
    policy = load_policy(ModelConfig(path=str(folder), dtype="float32"))
    return Models(policy, make_critic(policy, "shared"), policy, lambda prompts, texts: [float(len(t)) for t in texts])


PROMPTS = [Prompt("hello there", (5, 6, 7), 0), Prompt("good", (9, 8), 1)]


def test_rollout_measures_what_plain_scoring_measures(small):
    actors = actors_of(small)
    torch.nn.init.normal_(actors.critic.head.weight)
    out = collect(actors, PROMPTS, 3, 7, SampleConfig(max_new_tokens=6), 64, World())
    assert [len(t.response_ids) for t in out.trees] == [3, 3]
    assert out.score_R.tolist() == [float(len(t)) for t in out.texts]
    for r, response in enumerate(y for t in out.trees for y in t.response_ids):
        alone = batches.build([tree(PROMPTS[r // 3].ids, [response])], "rows")
        logp, value = logps_and_values(actors.policy, actors.critic, alone)
        n = len(response)
        order = alone.member_edge_M
        torch.testing.assert_close(out.logp_RT[r, :n], logp[order].detach(), atol=1e-4, rtol=0)
        torch.testing.assert_close(out.value_RT[r, :n], value[order].detach(), atol=1e-3, rtol=1e-4)
        assert not out.mask_RT[r, n:].any()
    torch.testing.assert_close(out.logp_RT, out.ref_RT)


def test_the_first_update_is_the_policy_gradient(small):
    """At the policy that sampled, the clipped loss has the gradient of -sum A log pi."""
    actors = actors_of(small)
    settings = PpoSettings(advantage=Rloo(), kl=FixedKl(coef=0.1))
    out = collect(actors, PROMPTS, 3, 7, SampleConfig(max_new_tokens=6), 64, World())
    targets = make_targets(settings, out, 0.1)
    batch = batches.build(out.trees, "rows")
    parameter = actors.policy.causal_lm.get_input_embeddings().weight
    loss, _ = make_objective(settings, actors.policy, None, out, targets).loss(batch)
    found = torch.autograd.grad(loss, parameter)[0]
    logp_M = scored_logps(actors.policy, batch)[batch.member_edge_M]
    plain = -(targets.advantage_RT[out.mask_RT] * logp_M).sum()
    torch.testing.assert_close(found, torch.autograd.grad(plain, parameter)[0], atol=1e-5, rtol=1e-4)


def test_missing_end_penalty_scale_and_clip(small):
    out = collect(actors_of(small), PROMPTS, 3, 7, SampleConfig(max_new_tokens=3), 64, World())
    assert not out.ended_R.all()
    base = {"advantage": Rloo(whiten=False), "kl": FixedKl(coef=0.0)}
    plain = make_targets(PpoSettings(**base), out, 0.0).figures
    hard = make_targets(PpoSettings(**base, missing_end_penalty=5.0), out, 0.0).figures
    assert hard["objective"] == pytest.approx(plain["objective"] - 5.0 * (1 - plain["ended"]))
    clipped = make_targets(PpoSettings(**base, reward_scale=10.0, reward_clip=0.5), out, 0.0).figures
    assert clipped["objective"] <= 0.5
    assert clipped["reward"] == plain["reward"]


@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_gradient_does_not_depend_on_layout_or_packing(small, layout):
    from favor.model.layout import settle

    found = []
    for asked, budget in (("rows", 10_000), (layout, 20)):
        actors = actors_of(small)
        torch.nn.init.constant_(actors.critic.head.weight, 0.1)
        out = collect(actors, PROMPTS, 3, 7, SampleConfig(max_new_tokens=6), 10_000, World())
        settings = PpoSettings()
        policy, _ = settle(actors.policy, asked, out.trees)
        objective = make_objective(settings, policy, actors.critic, out, make_targets(settings, out, 0.1))
        total = sum(
            objective.loss(batches.build([out.trees[i] for i in members], policy.layout))[0]
            for members in batches.plan(out.trees, policy.layout, budget)
            if members
        )
        found.append(
            torch.autograd.grad(total, [actors.critic.head.weight, policy.causal_lm.get_input_embeddings().weight])
        )
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


# the bandit


REWARD = "def reward(prompts, responses):\n    return [{'A': 1.0, 'B': 0.5}.get(r, 0.0) for r in responses]\n"


@pytest.fixture(scope="module")
def bandit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bandit")
    tiny.save_words(folder / "model", ["A", "B", "x"])
    (folder / "reward.py").write_text(REWARD)
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "x"}) + "\n")
    return folder


def next_token(model_folder):
    policy = load_policy(ModelConfig(path=str(model_folder), dtype="float32"))
    with torch.no_grad():
        return policy.causal_lm(torch.tensor([[5]])).logits[0, -1].softmax(-1).double()


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_ppo_reaches_the_known_optimum(bandit, tmp_path, advantage):
    """pi* = ref exp(r/beta) / Z on every token of a one-token answer; total variation within 0.03."""
    beta = 0.5
    words = [
        f"run={tmp_path / 'run'}",
        f"model.path={bandit / 'model'}",
        "model.dtype=float32",
        f"data.train={bandit / 'prompts.jsonl'}",
        "reward.kind=callable",
        f"reward.path={bandit / 'reward.py'}:reward",
        "sample.max_new_tokens=1",
        "sample.batch=128",
        f"ppo.advantage.kind={advantage}",
        "ppo.kl.kind=fixed",
        f"ppo.kl.coef={beta}",
        "ppo.samples_per_prompt=128",
        "ppo.updates=1",
        *([] if advantage == "grpo" else ["ppo.advantage.whiten=false"]),
        "train.batch_prompts=1",
        "train.epochs=1000",
        "train.max_steps=100",
        "optim.lr=1e-2",
        "optim.schedule=linear",
        *(["ppo.advantage.value=detached"] if advantage == "gae" else []),
    ]
    train_ppo(load(PpoConfig, None, words), open_session)
    ref = next_token(bandit / "model")
    optimum = ref * (torch.tensor([0.0, 0.0, 0.0, 1.0, 0.5, 0.0], dtype=torch.float64) / beta).exp()
    optimum /= optimum.sum()
    reached = next_token(tmp_path / "run" / "model")
    assert float((ref - optimum).abs().sum() / 2) > 0.15
    assert float((reached - optimum).abs().sum() / 2) < 0.03
    steps = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "step"]
    exact_kl = float((optimum * (optimum / ref).log()).sum())
    assert sum(r["kl"] for r in steps[-20:]) / 20 == pytest.approx(exact_kl, abs=0.05)


def test_dpo_on_exact_preferences_reaches_the_same_optimum(bandit, tmp_path):
    """Preferences drawn with p* = s(r_A - r_B), as weights: log pi/ref of A less that of B comes to (r_A - r_B)/beta."""
    beta, gap = 0.5, 0.5
    p = 1 / (1 + math.exp(-gap))
    rows = [
        {"prompt": "x", "chosen": " A", "rejected": " B", "weight": p},
        {"prompt": "x", "chosen": " B", "rejected": " A", "weight": 1 - p},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = [
        f"run={tmp_path / 'run'}",
        f"model.path={bandit / 'model'}",
        "model.dtype=float32",
        f"data.train={tmp_path / 'pairs.jsonl'}",
        f"loss.beta={beta}",
        "train.epochs=200",
        "save.every=0",
        "optim.lr=3e-3",
    ]
    train(load(TrainConfig, None, words), open_session)
    ref, pi = next_token(bandit / "model"), next_token(tmp_path / "run" / "model")
    policies = [
        load_policy(ModelConfig(path=str(f), dtype="float32")) for f in (tmp_path / "run/model", bandit / "model")
    ]
    batch = batches.build([tree((5,), [(3, 2), (4, 2)])], "rows")
    from favor.model.logprobs import response_logps

    with torch.no_grad():
        a, b = (response_logps(policies[0], batch) - response_logps(policies[1], batch)).tolist()
    assert a - b == pytest.approx(gap / beta, abs=0.01)
    assert not torch.allclose(ref, pi)


# whole runs


def ppo_words(folder, run, *more):
    return [
        f"run={run}",
        f"model.path={folder / 'model'}",
        "model.dtype=float32",
        f"data.train={folder / 'prompts.jsonl'}",
        "reward.kind=callable",
        f"reward.path={folder / 'reward.py'}:reward",
        "sample.max_new_tokens=4",
        "ppo.samples_per_prompt=4",
        "train.batch_prompts=1",
        "train.epochs=100",
        "train.max_steps=6",
        "save.every=2",
        "optim.lr=1e-3",
        *more,
    ]


@pytest.mark.parametrize("value", ["shared", "separate"])
def test_resume_gives_the_same_bits(bandit, tmp_path, value):
    words = ppo_words(bandit, tmp_path / "whole", f"ppo.advantage.value={value}")
    train_ppo(load(PpoConfig, None, words), open_session)
    stop = StopRequest()

    def stopping(root):
        session = open_session(root, stop)
        original = session.record

        def record(item):
            original(item)
            if item["kind"] == "step" and item["step"] == 3:
                stop.signal_number = 15

        object.__setattr__(session, "record", record)
        return session

    words = ppo_words(bandit, tmp_path / "cut", f"ppo.advantage.value={value}")
    with pytest.raises(StoppedError):
        train_ppo(load(PpoConfig, None, words), stopping)
    train_ppo(load(PpoConfig, None, [*words, "resume=true"]), open_session)
    whole, cut = (
        load_policy(ModelConfig(path=str(tmp_path / n / "model"))).model.state_dict() for n in ("whole", "cut")
    )
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    curves = [
        {
            r["step"]: (r["kl"], r["reward"], r["kl_coef"])
            for r in read_jsonl(tmp_path / n / "metrics.jsonl")
            if r["kind"] == "step"
        }
        for n in ("whole", "cut")
    ]
    assert curves[0] == curves[1]


def test_prompts_under_another_name(bandit, tmp_path):
    (tmp_path / "asked.jsonl").write_text(json.dumps({"ask": "x"}) + "\n")
    more = (f"data.train={tmp_path / 'asked.jsonl'}", "train.max_steps=1")
    with pytest.raises(DataError, match=r"its columns are ask; .*: 'columns=\{prompt=\"COLUMN\"\}'$"):
        train_ppo(load(PpoConfig, None, ppo_words(bandit, tmp_path / "run", *more)), open_session)
    named = expanded("ppo", ["columns.prompt=ask"])
    train_ppo(load(PpoConfig, None, ppo_words(bandit, tmp_path / "run", *more, *named)), open_session)
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_kl_explosion_stops_with_the_last_good_model(bandit, tmp_path):
    words = ppo_words(
        bandit, tmp_path / "run", "optim.lr=0.3", "ppo.explosion_kl=0.5", "save.every=1", "train.max_steps=40"
    )
    with pytest.raises(NumericsError, match="KL explosion.*is that of rollout"):
        train_ppo(load(PpoConfig, None, words), open_session)
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    (alarm,) = [r for r in records if r.get("name") == "kl_explosion"]
    good = next(r for r in records if r.get("name") == "finished")["step"]
    assert good <= alarm["step"]
    # the rollout that the good model gave was sound
    kl_of = {r["step"]: r["kl"] for r in records if r["kind"] == "step"}
    assert kl_of[good + 1] <= 0.5
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_lora_reference_is_the_model_with_adapters_off(small, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "hello"}) + "\n")
    (tmp_path / "r.py").write_text("def reward(p, r):\n    return [float('a' in x) for x in r]\n")
    words = [
        f"run={tmp_path / 'run'}",
        f"model.path={small}",
        "model.dtype=float32",
        "model.lora.rank=2",
        f"data.train={tmp_path / 'p.jsonl'}",
        "reward.kind=callable",
        f"reward.path={tmp_path / 'r.py'}:reward",
        "sample.max_new_tokens=4",
        "train.epochs=9",
        "train.max_steps=3",
        "optim.lr=1e-2",
    ]
    train_ppo(load(PpoConfig, None, words), open_session)
    steps = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "step"]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert steps[-1]["kl"] != 0
    assert (tmp_path / "run" / "model" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ppo.advantage.kind=rloo", "ppo.advantage.lam=0.9"], "ppo.advantage.*lam"),
        (["ppo.kl.kind=fixed", "ppo.kl.target=3"], "ppo.kl.*target"),
        (["ppo.advantage.kind=grpo", "ppo.samples_per_prompt=1"], "at least 2"),
        (["sample.temperature=0.7"], "temperature must be 1"),
        (["reward.beta=0.1"], "implicit"),
    ],
)
def test_contradictions_are_refused(bandit, tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        load(PpoConfig, None, ppo_words(bandit, tmp_path / "run", *words))
