"""`favor loop`: online preference learning: each round samples from the current model, ranks by a reward and trains.

In: OnlineConfig. Out: run/round-N with prompts, preferences and training run, and rounds.jsonl; round N+1 starts from
the model of round N, which is its reference too. Next: generate/prefer.py.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, model_validator

from favor.config import STRICT, Resume, Run, Seed, dump
from favor.data.prompts import NumberedPrompts, read_prompts
from favor.data.read import DataConfig
from favor.data.settings import Columns, kwargs_are_read
from favor.data.tokenize import TokensConfig
from favor.errors import CheckpointError, ConfigError
from favor.generate.engines import Decoding, TransformersEngine
from favor.generate.prefer import PreferConfig, prefer
from favor.generate.samples import Progress, PromptsFile, Split
from favor.guard import content, is_sealed, seal, sha
from favor.losses.table import LossConfig, make_loss, needs
from favor.model.load import ModelConfig, TrainedModel
from favor.model.sample import SampleConfig
from favor.output import hashes
from favor.rewards.source import RewardConfig, check_scorer, identity
from favor.run import RunFolder, make_folder, read_json, remove_folder, same_inputs, write_json, write_jsonl, write_text
from favor.stop import StoppedError
from favor.train.checkpoint import checkpoints
from favor.train.loop import LoopConfig, SaveConfig
from favor.train.optim import AdamW, OptimConfig
from favor.train.preference import TrainConfig, train
from favor.train.session import OpenSession, Session, recipe_hash, running


class OnlineConfig(BaseModel):
    """A recipe for `favor loop`. Round r takes the r-th `prompts_per_round` prompts, from the first again after the last."""

    model_config = STRICT
    _kwargs = model_validator(mode="after")(kwargs_are_read)
    run: Run
    seed: Seed = 0
    resume: Resume = False
    rounds: int = Field(default=3, ge=1)
    """Number of rounds; each samples, ranks and trains."""
    model: TrainedModel
    prompts: PromptsFile
    split: Split = "train"
    columns: Columns = {}
    prompts_per_round: int = Field(default=256, ge=1)
    """Prompts sampled in a round."""
    samples_per_prompt: int = Field(default=4, ge=2, le=1000)
    """Responses per prompt, of which a ranking is made."""
    tokens: TokensConfig = TokensConfig()
    sample: SampleConfig = SampleConfig()
    reward: RewardConfig
    loss: LossConfig = make_loss()
    optim: OptimConfig = AdamW()
    train: LoopConfig = LoopConfig()
    save: SaveConfig = SaveConfig()

    @model_validator(mode="after")
    def _a_round_can_train(self) -> "OnlineConfig":
        if needs(self.loss).tokens:
            raise ValueError("loss.ld_alpha needs a live reference, and a round stores its own; remove it")
        if self.model.lora is not None:
            raise ValueError(
                "model.lora: the adapters of a round fit the merged model of the round before; train all weights"
            )
        return self


@dataclass(frozen=True)
class Round:
    """One round: what it is made with, and where it keeps things.

    prompts.jsonl; preferences.jsonl, rankings of the current model's samples; figures.json, what became of the samples, whose
    presence says that the preferences are done; made.json, hashes of what the next round goes on from; train, its run.
    """

    number: int
    config: OnlineConfig

    @property
    def root(self) -> Path:
        """Its folder."""
        return Path(self.config.run) / f"round-{self.number}"

    @property
    def train(self) -> RunFolder:
        """The round's training run."""
        return RunFolder(self.root / "train")

    @property
    def model(self) -> ModelConfig:
        """What the round starts from."""
        if self.number == 1:
            return self.config.model
        before = Round(self.number - 1, self.config).train.model
        return self.config.model.model_copy(update={"path": str(before), "revision": None})

    @property
    def seed(self) -> int:
        """Of its samples and its training."""
        return (self.config.seed + self.number) % (1 << 32)


def loop(config: OnlineConfig, open_session: OpenSession, progress: Progress) -> None:
    """All rounds; with resume=true finished ones are skipped and an unfinished one continues.

    Raises ConfigError for a folder that holds a run, and what sampling, scoring and training raise.
    """
    prompts = read_prompts(config.prompts, config.split, columns=config.columns)
    check_scorer(config.reward)
    with running(config.run, dump(config), resume=config.resume, open_session=open_session) as session:
        if session.world.size > 1:
            raise ConfigError("favor loop runs in one process; start it without torchrun")
        entered = {
            "content of model": content(config.model.path),
            "content of prompts": [prompt for _, prompt in prompts],
            "reward": identity(config.reward),
        }
        same_inputs(session.folder, recipe_hash(config) | hashes(entered))
        rounds = [Round(number, config) for number in range(1, config.rounds + 1)]
        for this in rounds:
            if not this.train.model.exists():
                session.say(f"round {this.number} of {config.rounds}")
                _sample(this, prompts, session, progress)
                _train(this, open_session)
            _seal(this)
            # written from the rounds' own figures, so that a kill between two files loses none
            figures = [read_json(each.root / "figures.json") for each in rounds[: this.number]]
            write_jsonl(RunFolder(Path(config.run)).rounds, figures)
        session.say(f"{config.rounds} rounds done; model in {rounds[-1].train.model}")


def _sample(this: Round, prompts: NumberedPrompts, session: Session, progress: Progress) -> None:
    """The round's prompts, and preferences among samples of the current model."""
    if (this.root / "figures.json").exists():
        _sound(this)
        return
    make_folder(this.root)
    count = min(this.config.prompts_per_round, len(prompts))
    chosen = [prompts[((this.number - 1) * count + i) % len(prompts)][1] for i in range(count)]
    write_jsonl(this.root / "prompts.jsonl", [{"prompt": prompt} for prompt in chosen])

    def stoppable(label: str, done: int, total: int) -> None:
        progress(f"round {this.number}: {label}", done, total)
        if session.stop.signal_number:
            raise StoppedError(
                f"stopped while sampling round {this.number}; continue with resume=true", session.stop.signal_number
            )

    report = prefer(_prefer_recipe(this), stoppable)
    session.say(str(report))
    text = json.dumps({"round": this.number, **asdict(report)}, indent=2) + "\n"
    # first, so that no figures are there without it
    write_json(
        this.root / "made.json",
        seal({"preferences": content(str(this.root / "preferences.jsonl")), "figures": sha(text)}),
    )
    write_text(this.root / "figures.json", text)


def _sound(this: Round) -> dict[str, Any]:
    """The hashes of what a round made. Raises CheckpointError when it is no longer that."""
    made = read_json(this.root / "made.json") if (this.root / "made.json").exists() else {}
    now = {
        "preferences": this.root / "preferences.jsonl",
        "figures": this.root / "figures.json",
        "model": this.train.model,
    }
    damaged = [name for name, path in now.items() if name in made and made[name] != content(str(path))]
    if not is_sealed(made) or not {"preferences", "figures"} <= made.keys():
        damaged = ["made.json"]
    if damaged:
        raise CheckpointError(
            f"{this.root}: its {' and '.join(damaged)} are not what was written; delete this round's folder and all later "
            "ones to make them again"
        )
    return made


def _seal(this: Round) -> None:
    """Keep the hash of the round's model, too. Raises CheckpointError when what the round made is no longer that."""
    made = _sound(this)
    if "model" not in made:
        del made["check"]
        write_json(this.root / "made.json", seal({**made, "model": content(str(this.train.model))}))


def _train(this: Round, open_session: OpenSession) -> None:
    """The round's training: continued from its newest checkpoint, or started afresh when there is none."""
    resume = bool(checkpoints(this.train.checkpoints))
    if not resume:
        remove_folder(this.train.root)
    train(_train_recipe(this).model_copy(update={"resume": resume}), open_session)


def _prefer_recipe(this: Round) -> PreferConfig:
    config = this.config
    engine = TransformersEngine(
        # its numbers may be those of masters, which bfloat16 has not
        model=this.model.model_copy(update={"gradient_checkpointing": False, "layout": "auto", "weights": "float32"}),
        template=config.tokens.template,
        special_text=config.tokens.special_text,
        batch=config.sample.batch,
    )
    return PreferConfig(
        out=str(this.root / "preferences.jsonl"),
        prompts=str(this.root / "prompts.jsonl"),
        engine=engine,
        sample=Decoding(max_new_tokens=config.sample.max_new_tokens, temperature=config.sample.temperature),
        samples_per_prompt=config.samples_per_prompt,
        reward=config.reward,
        seed=this.seed,
    )


def _train_recipe(this: Round) -> TrainConfig:
    config = this.config
    return TrainConfig(
        run=str(this.train.root),
        seed=this.seed,
        model=this.model,
        # a sample may be too long, or spell out a special token
        data=DataConfig(train=str(this.root / "preferences.jsonl"), bad_rows="drop"),
        tokens=config.tokens,
        loss=config.loss,
        optim=config.optim,
        train=config.train,
        save=config.save,
    )
