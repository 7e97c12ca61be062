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
from favor_frontier.recipe import FrontierConfig, Point


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
    began = time.monotonic()
    if point.method == "start":
        found = {"status": "ok"} | measure(config, bench.reference, bench, point.seed)
    elif point.method == "best_of_n":
        found = _best_of_n(config, task, places, point, bench)
    else:
        status = _train(config, task, places, point, root, open_session)
        model = RunFolder(root).model
        found = {"status": status}
        if model.exists():
            policy = load_policy(ModelConfig(path=str(model), dtype="float32"))
            found |= measure(config, policy, bench, point.seed)
            shutil.rmtree(model)
    found |= {"method": point.method, "strength": point.strength, "seed": point.seed}
    shutil.rmtree(RunFolder(root).checkpoints, ignore_errors=True)
    write_json(root / "point.json", found | {"seconds": time.monotonic() - began})


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
) -> str:
    """Train the point's policy; "ok", or what stopped it."""
    try:
        if point.method in ("ppo", "ppo_true"):
            train_ppo(_ppo_recipe(config, task, places, point, root), open_session)
        else:
            train(_preference_recipe(config, task, places, point, root), open_session)
    except NumericsError as error:
        return str(error)
    return "ok"


def _preference_recipe(config: FrontierConfig, task: Task, places: Places, point: Point, root: Path) -> TrainConfig:
    sizes, kind = config.offline, point.method
    options = {"unlikelihood": {"alpha": point.strength}, "preferred_ft": {}}.get(kind, {"beta": point.strength})
    epochs = int(point.strength) if kind == "preferred_ft" else sizes.epochs
    probe = None
    if probed := point.method == "dpo" and sizes.probe_every > 0:
        probe = KlConfig(every=sizes.probe_every, prompts=32, tokens=config.evaluate.max_new_tokens)
    return TrainConfig(
        run=str(root),
        seed=point.seed,
        model=start_model(task, places),
        data=DataConfig(train=str(places.preferences(point.seed))),
        tokens=task.tokens,
        loss=make_loss(kind, **options),
        optim=AdamW(lr=sizes.lr, warmup=2),
        reference=ReferenceConfig(store=str(places.reference(point.seed))),
        train=LoopConfig(batch_prompts=sizes.batch_prompts, epochs=epochs, max_tokens_per_pack=2048),
        save=SaveConfig(every=0),
        watch=WatchConfig(kl=probe),
        reward=task.reward if probed else None,
    )


def _ppo_recipe(config: FrontierConfig, task: Task, places: Places, point: Point, root: Path) -> PpoConfig:
    sizes = config.ppo
    # beside the run: its folder is not there before it starts. Both PPO methods of a seed write the same
    prompts = places.preferences(point.seed).with_name("prompts.jsonl")
    chosen = training_prompts(config, task, point.seed)
    write_jsonl(prompts, [{"prompt": text} for _, text in chosen])
    return PpoConfig(
        run=str(root),
        seed=point.seed,
        model=start_model(task, places),
        data=PromptsConfig(train=str(prompts)),
        tokens=PromptTokens(template=task.tokens.template, special_text=task.tokens.special_text),
        reward=learnt_reward(task, places, point.seed) if point.method == "ppo" else task.reward,
        ppo=PpoSettings(
            samples_per_prompt=sizes.answers,
            updates=sizes.updates,
            kl=AdaptiveKl(target=point.strength, coef=sizes.kl_coef, horizon=sizes.kl_horizon),
            reward_scale=read_json(places.scales(point.seed))[point.method],
            explosion_kl=sizes.explosion_kl,
        ),
        sample=SampleConfig(max_new_tokens=config.evaluate.max_new_tokens, batch=128),
        optim=AdamW(lr=sizes.lr, schedule="constant"),
        train=LoopConfig(
            batch_prompts=sizes.batch_prompts,
            epochs=1_000,
            max_steps=sizes.rollouts,
            max_tokens_per_pack=2048,
        ),
        save=SaveConfig(every=max(1, sizes.rollouts // 4), keep=1),
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
