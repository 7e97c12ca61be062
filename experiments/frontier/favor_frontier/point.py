"""One point: train (or sample) a policy at one strength and seed, and judge it on held-out prompts.

In: a Point and the shared parts. Out: point.json, and the run's metrics; the model is not kept. Next: summary.py.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

from favor.data.prompts import NumberedPrompts, PromptTokens, encode_prompts, read_prompts, sample_seeds
from favor.data.read import DataConfig
from favor.data.types import TokenTree
from favor.errors import NumericsError
from favor.eval.figures import log_ratios
from favor.losses.table import make_loss
from favor.model.layout import settle
from favor.model.load import ModelConfig, Policy, load_policy
from favor.model.logprobs import response_logps
from favor.model.sample import SampleConfig, decode, sample
from favor.online import OnlineConfig, Round, loop
from favor.rewards.source import Scorer, make_scorer
from favor.run import RunFolder, make_folder, read_json, read_jsonl, write_json, write_jsonl
from favor.train.loop import LoopConfig, SaveConfig
from favor.train.optim import AdamW
from favor.train.ppo import AdaptiveKl, PpoConfig, PpoSettings, PromptsConfig, train_ppo
from favor.train.preference import TrainConfig, train
from favor.train.reference import ReferenceConfig
from favor.train.session import OpenSession
from favor.train.watch import KlConfig, WatchConfig
from favor_frontier.prepare import Places, Task, learnt_reward, start_model, training_prompts
from favor_frontier.recipe import FrontierConfig, Point, calls, num_prompts, num_rollouts


@dataclass(frozen=True)
class Bench:
    """The held-out prompts, the reference and the ground truth, loaded once per process."""

    reference: Policy
    scorer: Scorer
    prompts: NumberedPrompts
    ids: list[tuple[int, ...]]


def make_bench(config: FrontierConfig, task: Task, places: Places) -> Bench:
    """Load what every point is judged by."""
    reference = load_policy(start_model(task, places))
    prompts = read_prompts(task.eval_prompts, "train", config.evaluate.prompts)
    ids = encode_prompts(task.eval_prompts, prompts, reference.tokenizer, task.tokens)
    return Bench(reference, make_scorer(task.reward), prompts, ids)


def run_point(
    config: FrontierConfig, task: Task, places: Places, point: Point, bench: Bench, open_session: OpenSession
) -> None:
    """Compute a point unless its point.json is there; one that was interrupted starts anew."""
    root = places.point(point.name)
    if (root / "point.json").exists():
        return
    shutil.rmtree(root, ignore_errors=True)
    make_folder(root)
    # of a core, not of the clock: points run beside each other, and beside whatever else the machine does
    began = time.process_time()
    spent = 0.0
    if point.method == "start":
        found = {"status": "ok"} | measure(config, bench.reference, bench, point.seed)
    elif point.method == "best_of_n":
        found = _best_of_n(config, task, places, point, bench)
    else:
        status, model = _train(config, task, places, point, root, open_session)
        spent = time.process_time() - began
        found = {"status": status}
        if model.exists():
            policy = load_policy(ModelConfig(path=str(model), dtype="float32"))
            found |= measure(config, policy, bench, point.seed)
        for path in (*root.glob("**/model"), *root.glob("**/checkpoints")):
            shutil.rmtree(path)
    found |= {"method": point.method, "strength": point.strength, "seed": point.seed, "share": point.share}
    found |= {"calls": calls(config, point), "core_seconds": spent + _shared_seconds(places, point)}
    write_json(root / "point.json", found)


# the shared parts that a method stands on
_STANDS_ON = {
    **dict.fromkeys(("dpo", "ipo", "kto", "unlikelihood"), ("label", "reference")),
    "preferred_ft": ("label",),
    **dict.fromkeys(("ppo", "best_of_n"), ("label", "reward")),
}


def _shared_seconds(places: Places, point: Point) -> float:
    """Seconds of a core that labels, stored log-probs and the reward model took, as far as the method needs them."""
    spent = 0.0
    for kind in _STANDS_ON.get(point.method, ()):
        if kind == "label":
            # a share's labels are some of the seed's
            spent += point.share * read_json(places.cost(kind, point.seed))["core_seconds"]
        elif kind == "reward" or point.share == 1:
            # with less than all labels the run computes its reference itself
            spent += read_json(places.cost(kind, point.seed, point.share))["core_seconds"]
    return spent


def measure(config: FrontierConfig, policy: Policy, bench: Bench, seed: int) -> dict[str, Any]:
    """Sample the held-out prompts; reward, log pi - log ref, and length of every sample, by the same streams at every point."""
    each = config.evaluate.samples
    settings = SampleConfig(max_new_tokens=config.evaluate.max_new_tokens, batch=128)
    ids = [i for i in bench.ids for _ in range(each)]
    out = sample(policy, ids, sample_seeds(1_000 + seed, list(range(len(bench.ids))), each), settings)
    trees = [
        TokenTree(prompt, tuple(out[k * each : (k + 1) * each]), (True,) * each, (), first_response=k * each, row=k)
        for k, prompt in enumerate(bench.ids)
    ]
    settled, _ = settle(policy, "auto", trees)
    base, _ = settle(bench.reference, settled.layout, trees)
    kl = log_ratios(settled, lambda batch: response_logps(base, batch), trees).tolist()
    return _scored(bench, out, kl, each, policy)


def _scored(bench: Bench, out: Sequence[tuple[int, ...]], kl: list[float], each: int, policy: Policy) -> dict[str, Any]:
    texts = decode(policy.tokenizer, out)
    prompts = [text for _, text in bench.prompts for _ in range(each)]
    reward = bench.scorer(prompts, texts)
    shown = [{"prompt": prompts[i], "text": texts[i], "reward": reward[i]} for i in range(0, len(texts), each)]
    return {
        "reward": reward,
        "kl": kl,
        "length": [len(response) for response in out],
        "ended": sum(response[-1] in policy.end_ids for response in out) / len(out),
        "prompt": [i for i in range(len(bench.prompts)) for _ in range(each)],
        "samples": shown[:6],
    }


def _best_of_n(config: FrontierConfig, task: Task, places: Places, point: Point, bench: Bench) -> dict[str, Any]:
    """The learnt reward's favourite of N samples of the start. KL <= log N - (N-1)/N (Beirami et al. 2024, arXiv 2401.01879)."""
    count, each = int(point.strength), config.evaluate.samples
    settings = SampleConfig(max_new_tokens=config.evaluate.max_new_tokens, batch=128)
    ids = [i for i in bench.ids for _ in range(each * count)]
    seeds = sample_seeds(1_000 + point.seed, list(range(len(bench.ids))), each * count)
    out = sample(bench.reference, ids, seeds, settings)
    texts = decode(bench.reference.tokenizer, out)
    learnt = make_scorer(learnt_reward(task, places, point.seed))
    scores = learnt([text for _, text in bench.prompts for _ in range(each * count)], texts)
    best = [max(range(k, k + count), key=scores.__getitem__) for k in range(0, len(out), count)]
    bound = log(count) - (count - 1) / count
    return {"status": "ok"} | _scored(bench, [out[i] for i in best], [bound] * len(best), each, bench.reference)


def _train(
    config: FrontierConfig, task: Task, places: Places, point: Point, root: Path, open_session: OpenSession
) -> tuple[str, Path]:
    """Train the point's policy; "ok", or what stopped it, and where its model would lie."""
    model = RunFolder(root).model
    try:
        if point.method in ("ppo", "ppo_true"):
            train_ppo(_ppo_recipe(config, task, places, point, root), open_session)
        elif point.method == "dpo_fresh":
            recipe = _fresh_recipe(config, task, places, point, root)
            model = Round(recipe.rounds, recipe).train.model
            loop(recipe, open_session, lambda label, done, total: None)
        else:
            train(_preference_recipe(config, task, places, point, root), open_session)
    except NumericsError as error:
        return str(error), model
    return "ok", model


def _preference_recipe(config: FrontierConfig, task: Task, places: Places, point: Point, root: Path) -> TrainConfig:
    sizes, kind = config.offline, point.method
    options = {"unlikelihood": {"alpha": point.strength}, "preferred_ft": {}}.get(kind, {"beta": point.strength})
    epochs = int(point.strength) if kind == "preferred_ft" else sizes.epochs
    probe = None
    # one seed shows how training goes; the others' seconds are training alone
    if probed := point.method == "dpo" and sizes.probe_every > 0 and point.seed == config.seeds[0]:
        probe = KlConfig(every=sizes.probe_every, prompts=32, tokens=config.evaluate.max_new_tokens)
    return TrainConfig(
        run=str(root),
        seed=point.seed,
        model=start_model(task, places),
        data=DataConfig(train=str(places.preferences(point.seed, point.share))),
        tokens=task.tokens,
        loss=make_loss(kind, **options),
        optim=AdamW(lr=sizes.lr, warmup=2),
        reference=ReferenceConfig(store=str(places.reference(point.seed)) if point.share == 1 else None),
        train=LoopConfig(batch_prompts=sizes.batch_prompts, epochs=epochs, max_tokens_per_pack=2048),
        save=SaveConfig(every=0),
        watch=WatchConfig(kl=probe),
        reward=task.reward if probed else None,
    )


def _fresh_recipe(config: FrontierConfig, task: Task, places: Places, point: Point, root: Path) -> OnlineConfig:
    sizes = config.offline
    return OnlineConfig(
        run=str(root),
        seed=point.seed,
        rounds=config.fresh.rounds,
        model=start_model(task, places),
        prompts=str(_prompts_file(config, task, places, point)),
        prompts_per_round=num_prompts(config, point.share) // config.fresh.rounds,
        samples_per_prompt=sizes.answers,
        tokens=task.tokens,
        sample=SampleConfig(max_new_tokens=config.evaluate.max_new_tokens, batch=128),
        reward=task.reward,
        loss=make_loss("dpo", beta=point.strength),
        optim=AdamW(lr=sizes.lr, warmup=2),
        train=LoopConfig(batch_prompts=sizes.batch_prompts, epochs=sizes.epochs, max_tokens_per_pack=2048),
        save=SaveConfig(every=0),
    )


def _prompts_file(config: FrontierConfig, task: Task, places: Places, point: Point) -> Path:
    """The seed's prompts, beside the run: its folder is not there before it starts. Every method of a seed writes the same."""
    path = places.preferences(point.seed).with_name("prompts.jsonl")
    write_jsonl(path, [{"prompt": text} for _, text in training_prompts(config, task, point.seed)])
    return path


def _ppo_recipe(config: FrontierConfig, task: Task, places: Places, point: Point, root: Path) -> PpoConfig:
    sizes, learnt = config.ppo, point.method == "ppo"
    # PPO on the learnt reward asks nothing while it runs: a share of the labels is the reward model's
    rollouts = sizes.rollouts if learnt else num_rollouts(config, point.share)
    scales = places.scales(point.seed, point.share if learnt else 1.0)
    return PpoConfig(
        run=str(root),
        seed=point.seed,
        model=start_model(task, places),
        data=PromptsConfig(train=str(_prompts_file(config, task, places, point))),
        tokens=PromptTokens(template=task.tokens.template, special_text=task.tokens.special_text),
        reward=learnt_reward(task, places, point.seed, point.share) if learnt else task.reward,
        ppo=PpoSettings(
            samples_per_prompt=sizes.answers,
            updates=sizes.updates,
            kl=AdaptiveKl(target=point.strength, coef=sizes.kl_coef, horizon=sizes.kl_horizon),
            reward_scale=read_json(scales)[point.method],
            explosion_kl=sizes.explosion_kl,
        ),
        sample=SampleConfig(max_new_tokens=config.evaluate.max_new_tokens, batch=128),
        optim=AdamW(lr=sizes.lr, schedule="constant"),
        train=LoopConfig(
            batch_prompts=sizes.batch_prompts,
            epochs=1_000,
            max_steps=rollouts,
            max_tokens_per_pack=2048,
        ),
        save=SaveConfig(every=max(1, rollouts // 4), keep=1),
    )


def curve(root: Path) -> list[dict[str, float]]:
    """KL and reward over a point's training: one record per probe (DPO) or rollout (PPO)."""
    path = RunFolder(root).metrics
    found: list[dict[str, float]] = []
    for record in read_jsonl(path) if path.exists() else []:
        if record.get("kind") == "step" and "kl" in record and "reward" in record:
            value = {name: record[name] for name in ("step", "kl", "reward", "seconds")}
            if not found or value["kl"] != found[-1]["kl"]:
                found.append(value)
    return found
