"""What all points share: the start (SFT), and for every seed preferences sampled from it and a reward model.

In: FrontierConfig. Out: files and folders below the run; what is there already is kept. Next: point.py.
"""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import pstdev
from typing import Any

import numpy as np
from torch import Tensor

from favor.data.prompts import NumberedPrompts, encode_prompts, read_prompts, sample_seeds
from favor.data.read import DataConfig
from favor.data.tokenize import TokensConfig
from favor.data.types import TokenTree
from favor.demo import model_folder, review_files
from favor.model.batched import measured
from favor.model.layout import settle
from favor.model.load import ModelConfig, load_policy
from favor.model.logprobs import response_logps
from favor.model.sample import SampleConfig, decode, sample
from favor.rewards.model import ScoredTokens
from favor.rewards.source import CallableReward, ClassifierReward, ModelReward, RewardConfig, make_scorer
from favor.run import RunFolder, cache_folder, make_folder, read_jsonl, remove_folder, write_json, write_jsonl
from favor.train import reference
from favor.train.loop import LoopConfig, SaveConfig
from favor.train.optim import AdamW
from favor.train.reward import RewardTrainConfig, train_reward
from favor.train.session import OpenSession, Session, load_splits
from favor.train.sft import SftConfig, sft
from favor_frontier.films import film_files
from favor_frontier.recipe import FrontierConfig, num_prompts
from favor_frontier.shrink import shrink


@dataclass(frozen=True)
class Task:
    """What the picture is about, settled: files, the model before SFT, the ground-truth reward."""

    model: Path
    prompts: str
    eval_prompts: str
    sft: str | None
    reward: RewardConfig
    tokens: TokensConfig


@dataclass(frozen=True)
class Places:
    """Where the shared parts lie; those of less than all labels (share) under a name of their own."""

    root: Path

    @property
    def start(self) -> Path:
        """The run folder of the SFT; its model is every method's start and reference."""
        return self.root / "sft"

    def preferences(self, seed: int, share: float = 1.0) -> Path:
        """Ranked answers of the start, labelled by the ground truth."""
        return self.root / f"seed-{seed}" / f"preferences{_part(share)}.jsonl"

    def reference(self, seed: int) -> Path:
        """The start's log-probs of these answers, which every method of the seed reads."""
        return self.root / f"seed-{seed}" / "reference.safetensors"

    def scales(self, seed: int, share: float = 1.0) -> Path:
        """What brings each PPO reward to standard deviation 1 on the start's answers (JSON)."""
        return self.root / f"seed-{seed}" / f"scales{_part(share)}.json"

    def reward(self, seed: int, share: float = 1.0) -> Path:
        """The run folder of the learnt reward."""
        return self.root / f"seed-{seed}" / f"reward{_part(share)}"

    def cost(self, kind: str, seed: int, share: float = 1.0) -> Path:
        """Seconds of a core that a shared part took (JSON): label, reference or reward. Written when the part is done."""
        return self.root / f"seed-{seed}" / f"cost-{kind}{_part(share)}.json"

    def point(self, name: str) -> Path:
        """The run folder of a point."""
        return self.root / "points" / name


def _part(share: float) -> str:
    return f"-{share:g}" if share < 1 else ""


@contextmanager
def _costs(path: Path) -> Generator[None]:
    """Seconds of a core, written when the part is done."""
    began = time.process_time()
    yield
    write_json(path, {"core_seconds": time.process_time() - began})


def settle_task(config: FrontierConfig, root: Path, say: Callable[[str], None]) -> Task:
    """The recipe's own task, or the embedded one: fetched, and its model cut to size, once."""
    if (own := config.task) is not None:
        return Task(Path(own.model), own.prompts, own.eval_prompts, own.sft, own.reward, own.tokens)
    cache = cache_folder()
    full, reviews, files = model_folder(cache, say), review_files(cache, say), film_files(cache, say)
    small = root / "base"
    if not small.exists():
        rows = [row for name in ("sft", "eval") for row in read_jsonl(files / f"{name}.jsonl")]
        texts = [row["prompt"] + row.get("completion", "") for row in rows]
        size = shrink(full, texts, config.layers, small)
        say(f"start: layers {list(config.layers)} of SmolLM2-135M-Instruct, {size} tokens of its vocabulary")
    return Task(
        model=small,
        prompts=str(files / "sft.jsonl"),
        eval_prompts=str(files / "eval.jsonl"),
        sft=str(files / "sft.jsonl"),
        reward=CallableReward(path="favor_frontier.style:score")
        if config.embedded == "format"
        else ClassifierReward(path=str(reviews / "classifier.jsonl")),
        tokens=TokensConfig(template="plain"),
    )


def start_model(task: Task, places: Places) -> ModelConfig:
    """The policy that everything starts from."""
    return ModelConfig(path=str(task.model if task.sft is None else RunFolder(places.start).model), dtype="float32")


def fine_tune(config: FrontierConfig, task: Task, places: Places, open_session: OpenSession) -> None:
    """SFT, unless it is there or there is nothing to fine-tune on."""
    if task.sft is None or RunFolder(places.start).model.exists():
        return
    recipe = SftConfig(
        run=str(places.start),
        resume=RunFolder(places.start).config.exists(),
        model=ModelConfig(path=str(task.model), dtype="float32"),
        data=DataConfig(train=task.sft, max_rows=config.sft.max_rows),
        tokens=task.tokens,
        optim=AdamW(lr=config.sft.lr, schedule="cosine", warmup=5),
        train=LoopConfig(
            batch_prompts=config.sft.batch_prompts,
            epochs=config.sft.epochs,
            max_tokens_per_pack=2048,
        ),
        save=SaveConfig(every=50, keep=1),
    )
    sft(recipe, open_session)


def label(config: FrontierConfig, task: Task, places: Places, seed: int) -> None:
    """Sample answers of the start and let the ground truth score them, with which of them came to their end."""
    path = places.preferences(seed)
    if path.exists():
        return
    make_folder(path.parent)
    with _costs(places.cost("label", seed)):
        rows = _labelled(config, task, places, seed)
    for share in config.budgets:
        few = num_prompts(config, share)
        write_jsonl(places.preferences(seed, share), [row for place, row in rows if place < few])
    # last: what is there is whole
    write_jsonl(path, [row for _, row in rows])


def _labelled(config: FrontierConfig, task: Task, places: Places, seed: int) -> list[tuple[int, dict[str, Any]]]:
    """Rankings of answers that differ in score, each with the place of its prompt."""
    policy = load_policy(start_model(task, places))
    prompts = training_prompts(config, task, seed)
    each = config.offline.answers
    ids = encode_prompts(task.prompts, prompts, policy.tokenizer, task.tokens)
    seeds = sample_seeds(seed, list(range(len(prompts))), each)
    settings = SampleConfig(max_new_tokens=config.evaluate.max_new_tokens, batch=128)
    out = sample(policy, [i for i in ids for _ in range(each)], seeds, settings)
    texts = decode(policy.tokenizer, out)
    scores = make_scorer(task.reward)([text for _, text in prompts for _ in range(each)], texts)
    rows: list[tuple[int, dict[str, Any]]] = []
    for i, (_, prompt) in enumerate(prompts):
        mine = range(i * each, (i + 1) * each)
        kept = {texts[k]: k for k in mine if texts[k].strip()}
        if len({scores[k] for k in kept.values()}) > 1:
            ended = [out[k][-1] in policy.end_ids for k in kept.values()]
            values = [scores[k] for k in kept.values()]
            rows.append((i, {"prompt": prompt, "responses": list(kept), "scores": values, "ended": ended}))
    return rows


def store_reference(task: Task, places: Places, seed: int, open_session: OpenSession) -> None:
    """Log-probs of the seed's answers under the start, once for all its points."""
    if places.cost("reference", seed).exists():
        return
    path = places.reference(seed)
    session = open_session(path.parent)
    with _costs(places.cost("reference", seed)):
        _store(task, places, seed, path, session)


def _store(task: Task, places: Places, seed: int, path: Path, session: Session) -> None:
    policy = load_policy(start_model(task, places))
    data = DataConfig(train=str(places.preferences(seed)))
    splits = load_splits(data, task.tokens, policy, session)
    splits.need_comparisons()
    policy, _ = settle(policy, "auto", splits.train)

    def build(trees: Sequence[TokenTree]) -> Tensor:
        return measured(policy, trees, lambda batch: response_logps(policy, batch), 2048, session.world)

    identity = reference.identity(policy, task.tokens)
    reference.stored(policy, {"train": splits.train}, identity, path, build, session.world)


def learn_reward(
    config: FrontierConfig, task: Task, places: Places, seed: int, share: float, open_session: OpenSession
) -> None:
    """The Bradley-Terry reward model of RLHF, from the same preferences that DPO sees."""
    root = places.reward(seed, share)
    if places.cost("reward", seed, share).exists():
        return
    others = [s for s in config.seeds if s != seed]
    # one that was interrupted starts anew, as a point does
    remove_folder(root)
    recipe = RewardTrainConfig(
        run=str(root),
        seed=seed,
        model=start_model(task, places),
        # another seed's answers are new to it: they measure accuracy and calibration
        data=DataConfig(
            train=str(places.preferences(seed, share)), eval=str(places.preferences(others[0])) if others else None
        ),
        tokens=task.tokens,
        optim=AdamW(lr=config.offline.reward_lr, warmup=2),
        train=LoopConfig(
            batch_prompts=config.offline.batch_prompts,
            epochs=config.offline.reward_epochs,
            max_tokens_per_pack=2048,
        ),
        save=SaveConfig(every=0),
    )
    with _costs(places.cost("reward", seed, share)):
        train_reward(recipe, open_session)


def scale_rewards(task: Task, places: Places, seed: int, share: float = 1.0) -> None:
    """Write 1/(standard deviation) of either reward on the start's answers, so that one KL coefficient suits both."""
    path = places.scales(seed, share)
    if path.exists():
        return
    rows = read_jsonl(places.preferences(seed, share))
    learnt = make_scorer(learnt_reward(task, places, seed, share))
    prompts = [row["prompt"] for row in rows for _ in row["responses"]]
    scores = learnt(prompts, [text for row in rows for text in row["responses"]])
    true = [score for row in rows for score in row["scores"]]
    # a reward that says nothing keeps its scale
    write_json(path, {"ppo": 1 / (pstdev(scores) or 1.0), "ppo_true": 1 / (pstdev(true) or 1.0)})


def learnt_reward(task: Task, places: Places, seed: int, share: float = 1.0) -> RewardConfig:
    """The seed's reward model as a [reward]."""
    tokens = ScoredTokens(template=task.tokens.template, max_tokens=task.tokens.max_tokens)
    return ModelReward(path=str(RunFolder(places.reward(seed, share)).model), tokens=tokens)


def training_prompts(config: FrontierConfig, task: Task, seed: int) -> NumberedPrompts:
    """`offline.prompts` prompts of the training file; every seed draws its own."""
    found = read_prompts(task.prompts, "train")
    order = np.random.default_rng([seed, 7]).permutation(len(found))
    return [found[i] for i in order[: config.offline.prompts]]
