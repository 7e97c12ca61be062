"""A model that reads pictures -> a Policy with its sight; or why this command cannot use it.

In: ModelConfig. Out: Policy. Next: vision.py.
"""

from dataclasses import replace

from transformers import AutoModelForImageTextToText

from favor.errors import CheckpointError
from favor.model.load import ModelConfig, Policy, load_parts, make_policy
from favor.model.vision import freeze, load_sight, refuse
from favor.ranks import Shard


def load(config: ModelConfig, seed: int, shard: Shard, *, frozen: bool, sees: bool) -> Policy:
    """As `load_policy`. Raises CheckpointError where the caller gives no pictures."""
    if not sees:
        raise CheckpointError(
            f"{config.path}: reads pictures, and this command works on text alone; favor train and favor eval take it "
            "(docs/vision.md)"
        )
    refuse(config, shard)
    sight = load_sight(config.path, config.revision, trust=config.trust_remote_code)
    model, _, found = load_parts(AutoModelForImageTextToText, config, frozen=frozen)
    found.refuse(config.path)
    freeze(model, config.vision)
    return replace(make_policy(model, sight.processor.tokenizer, config, seed, frozen=frozen), sight=sight)
