"""Resume as a property: whatever the recipe and wherever it stops, the resumed run is the unbroken one."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies
from safetensors.torch import load_file
from test_training import StopAt, curve, run_train, world_of_films  # noqa: F401 (a fixture)
from test_training import settings as recipe

from favor.stop import StoppedError

RECIPES = strategies.fixed_dictionaries(
    {
        "train.batch_prompts": strategies.integers(1, 5),
        "train.epochs": strategies.integers(1, 2),
        "save.every": strategies.integers(0, 3),
        "train.shuffle": strategies.sampled_from(["true", "false"]),
        "train.max_tokens_per_pack": strategies.sampled_from([40, 200, 1000]),
        "loss.kind": strategies.sampled_from(["dpo", "ipo", "kto", "aot", "plackett_luce"]),
        "optim.kind": strategies.sampled_from(["adamw", "rmsprop"]),
        "optim.schedule": strategies.sampled_from(["linear", "cosine", "constant"]),
        "watch.kl.every": strategies.sampled_from(["", "1", "2"]),
        "seed": strategies.integers(0, 3),
    }
)


def _holds(films, chosen, stops):
    """Train in one go, and with stops; weights and curves must be equal to the bit."""
    words = [f"{key}={value}" for key, value in chosen.items() if value != ""]
    if chosen["watch.kl.every"]:
        words += ["watch.kl.prompts=2", "watch.kl.tokens=4"]
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        run_train(recipe(films, here / "whole", *words))
        whole = curve(here / "whole")
        resume: list[str] = []
        for stop in stops:
            try:
                run_train(recipe(films, here / "broken", *words, *resume), StopAt(1 + stop % len(whole)))
                break
            except StoppedError:
                resume = ["resume=true"]
        else:
            run_train(recipe(films, here / "broken", *words, "resume=true"))
        assert curve(here / "broken") == whole
        a, b = (load_file(here / name / "model/model.safetensors") for name in ("whole", "broken"))
        assert a.keys() == b.keys()
        assert all(a[name].equal(b[name]) for name in a)
        shutil.rmtree(here / "broken")


GIVEN = given(chosen=RECIPES, stops=strategies.lists(strategies.integers(0, 20), min_size=1, max_size=3))
CALM = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=4, **CALM)
@GIVEN
def test_a_resumed_run_is_the_unbroken_one(world_of_films, chosen, stops):  # noqa: F811
    _holds(world_of_films, chosen, stops)


@pytest.mark.slow
@settings(max_examples=60, **CALM)
@GIVEN
def test_a_resumed_run_is_the_unbroken_one_often(world_of_films, chosen, stops):  # noqa: F811
    _holds(world_of_films, chosen, stops)
