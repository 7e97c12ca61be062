"""`favor loop`: online preference learning: each round samples from the current model, ranks by a reward and trains.

In: LoopRunConfig. Out: run/round-N with prompts, preferences and training run, and rounds.jsonl; round N+1 starts from
the model of round N, which is its reference too. Next: eval/prefer.py.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, model_validator

from favor.config import STRICT, Seed, dump
from favor.data.prompts import NumberedPrompts, read_prompts
from favor.data.read import DataConfig
from favor.data.tokenize import TokensConfig
from favor.errors import CheckpointError, ConfigError
from favor.generate.prefer import PreferConfig, prefer
from favor.guard import content, is_sealed, seal, sha
from favor.losses.table import LossConfig, make_loss
from favor.model.load import ModelConfig
from favor.model.sample import SampleConfig
from favor.output import hashes
from favor.rewards.source import RewardConfig, check_scorer, identity
from favor.run import RunFolder, make_folder, read_json, remove_folder, same_inputs, write_json, write_text
from favor.stop import StoppedError
from favor.train.checkpoint import checkpoints
from favor.train.loop import LoopConfig, SaveConfig
from favor.train.optim import OptimConfig
from favor.train.preference import TrainConfig, train
from favor.train.session import Session, recipe_hash, running

Progress = Callable[[str, int, int], None]


class LoopRunConfig(BaseModel):
    """A recipe for `favor loop`. Round r takes the r-th `prompts_per_round` prompts, and begins anew after the last."""

    model_config = STRICT
    run: str
    seed: Seed = 0
    resume: bool = False
    rounds: int = Field(default=3, ge=1)
    model: ModelConfig
    prompts: str
    split: str = "train"
    prompts_per_round: int = Field(default=256, ge=1)
    samples_per_prompt: int = Field(default=4, ge=2, le=1000)
    tokens: TokensConfig = TokensConfig()
    sample: SampleConfig = SampleConfig()
    reward: RewardConfig
    loss: LossConfig = make_loss()
    optim: OptimConfig = OptimConfig()
    train: LoopConfig = LoopConfig()
    save: SaveConfig = SaveConfig()

    @model_validator(mode="after")
    def _adapters_do_not_add_up(self) -> "LoopRunConfig":
        if self.model.lora is not None:
            raise ValueError(
                "model.lora: the adapters of a round fit the merged model of the round before; train in full"
            )
        return self


@dataclass(frozen=True)
class RoundFolder:
    """Where a round keeps things."""

    root: Path

    @property
    def prompts(self) -> Path:
        """The prompts of this round (JSONL)."""
        return self.root / "prompts.jsonl"

    @property
    def preferences(self) -> Path:
        """Rankings of the current model's samples (JSONL)."""
        return self.root / "preferences.jsonl"

    @property
    def figures(self) -> Path:
        """What became of the samples (JSON); its presence says that the preferences are done."""
        return self.root / "figures.json"

    @property
    def made(self) -> Path:
        """Hashes of the round's preferences and model (JSON): what the next round goes on from."""
        return self.root / "made.json"

    @property
    def train(self) -> RunFolder:
        """The round's training run."""
        return RunFolder(self.root / "train")


def loop(config: LoopRunConfig, open_session: Callable[[Path], Session], progress: Progress) -> None:
    """All rounds; with resume=true finished ones are skipped and an unfinished one continues.

    Raises ConfigError for a folder that holds a run, and what sampling, scoring and training raise.
    """
    prompts = read_prompts(config.prompts, config.split)
    check_scorer(config.reward)
    with running(config.run, dump(config), resume=config.resume, open_session=open_session) as session:
        _rounds(config, prompts, session, open_session, progress)


def _rounds(
    config: LoopRunConfig,
    prompts: NumberedPrompts,
    session: Session,
    open_session: Callable[[Path], Session],
    progress: Progress,
) -> None:
    if session.world.size > 1:
        raise ConfigError("favor loop runs in one process; start it without torchrun")
    entered = {
        "content of model": content(config.model.path),
        "content of prompts": [prompt for _, prompt in prompts],
        "reward": identity(config.reward),
    }
    same_inputs(session.folder, recipe_hash(config) | hashes(entered))
    for number in range(1, config.rounds + 1):
        place = _folder(config, number)
        if not place.train.model.exists():
            session.say(f"round {number} of {config.rounds}")
            _round(config, number, prompts, session, progress)
            _train(config, number, open_session)
        _seal(place)
        # written from the rounds' own figures, so that a kill between two files loses none
        _record(config, number)
    session.say(f"{config.rounds} rounds done; model in {_folder(config, config.rounds).train.model}")


def _round(config: LoopRunConfig, number: int, prompts: NumberedPrompts, session: Session, progress: Progress) -> None:
    """The round's prompts, and preferences among samples of the current model."""
    place = _folder(config, number)
    if place.figures.exists():
        _sound(place)
        return
    make_folder(place.root)
    count = min(config.prompts_per_round, len(prompts))
    chosen = [prompts[((number - 1) * count + i) % len(prompts)][1] for i in range(count)]
    write_text(place.prompts, "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in chosen))

    def stoppable(label: str, done: int, total: int) -> None:
        progress(f"round {number}: {label}", done, total)
        if session.stop.signal_number:
            raise StoppedError(
                f"stopped while sampling round {number}; continue with resume=true", session.stop.signal_number
            )

    report = prefer(_prefer_recipe(config, number), stoppable)
    session.say(str(report))
    text = json.dumps({"round": number, **asdict(report)}, indent=2) + "\n"
    # first, so that no figures are there without it
    write_json(place.made, seal({"preferences": content(str(place.preferences)), "figures": sha(text)}))
    write_text(place.figures, text)


def _sound(place: RoundFolder) -> dict[str, Any]:
    """The hashes of what a round made. Raises CheckpointError when it is no longer that."""
    made = read_json(place.made) if place.made.exists() else {}
    now = {"preferences": place.preferences, "figures": place.figures, "model": place.train.model}
    damaged = [name for name, path in now.items() if name in made and made[name] != content(str(path))]
    if not is_sealed(made) or not {"preferences", "figures"} <= made.keys():
        damaged = [place.made.name]
    if damaged:
        raise CheckpointError(
            f"{place.root}: its {' and '.join(damaged)} are not what was written; delete this round's folder and all later "
            "ones to make them again"
        )
    return made


def _seal(place: RoundFolder) -> None:
    """Keep the hash of the round's model, too. Raises CheckpointError when what the round made is no longer that."""
    made = _sound(place)
    if "model" not in made:
        del made["check"]
        write_json(place.made, seal({**made, "model": content(str(place.train.model))}))


def _train(config: LoopRunConfig, number: int, open_session: Callable[[Path], Session]) -> None:
    """The round's training: continued from its newest checkpoint, or begun anew when there is none."""
    folder = _folder(config, number).train
    resume = bool(checkpoints(folder.checkpoints))
    if not resume:
        remove_folder(folder.root)
    train(_train_recipe(config, number).model_copy(update={"resume": resume}), open_session)


def _folder(config: LoopRunConfig, number: int) -> RoundFolder:
    return RoundFolder(Path(config.run) / f"round-{number}")


def _record(config: LoopRunConfig, number: int) -> None:
    figures = [read_json(_folder(config, r).figures) for r in range(1, number + 1)]
    write_text(Path(config.run) / "rounds.jsonl", "".join(json.dumps(each) + "\n" for each in figures))


def _model(config: LoopRunConfig, number: int) -> ModelConfig:
    """What round `number` starts from."""
    if number == 1:
        return config.model
    return config.model.model_copy(update={"path": str(_folder(config, number - 1).train.model), "revision": None})


def _prefer_recipe(config: LoopRunConfig, number: int) -> PreferConfig:
    place = _folder(config, number)
    return PreferConfig(
        out=str(place.preferences),
        prompts=str(place.prompts),
        model=_model(config, number).model_copy(update={"gradient_checkpointing": False}),
        # its lengths are for training
        tokens=TokensConfig(template=config.tokens.template, special_text=config.tokens.special_text),
        sample=config.sample,
        samples_per_prompt=config.samples_per_prompt,
        reward=config.reward,
        seed=(config.seed + number) % (1 << 32),
    )


def _train_recipe(config: LoopRunConfig, number: int) -> TrainConfig:
    place = _folder(config, number)
    return TrainConfig(
        run=str(place.train.root),
        seed=(config.seed + number) % (1 << 32),
        model=_model(config, number),
        # a sample may be too long, or spell out a special token
        data=DataConfig(train=str(place.preferences), bad_rows="drop"),
        tokens=config.tokens,
        loss=config.loss,
        optim=config.optim,
        train=config.train,
        save=config.save,
    )
