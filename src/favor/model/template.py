"""What variables of a chat template are unless somebody says otherwise: kept in the template, so it is saved with the model.

In: a tokenizer and model.template_kwargs. Out: the same one. Next: load.py.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from favor.errors import ConfigError


def with_defaults(tokenizer: PreTrainedTokenizerBase, given: Mapping[str, Any], path: str) -> PreTrainedTokenizerBase:
    """The tokenizer, for whose template these are what variables are where whoever renders it does not say.

    Raises ConfigError where it has no chat template, or one that does not name them.
    """
    template = tokenizer.chat_template
    if given and not isinstance(template, str):
        raise ConfigError(f"model.template_kwargs is for a chat template, and {path} has none; leave it out")
    for name in given:
        if not re.search(rf"\b{re.escape(name)}\b", str(template)):
            raise ConfigError(
                f"model.template_kwargs: the chat template of {path} has no variable {name}; correct it or leave it out"
            )
    before = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in sorted(given.items())
    )
    # transformers takes the line break behind a block away: so the template's first line stays what it was
    before = before and before + "\n"
    # a tokenizer in memory may come twice
    if isinstance(template, str) and not template.startswith(before):
        tokenizer.chat_template = before + template
    return tokenizer


def _literal(value: Any) -> str:
    """A value as Jinja writes it: JSON, but for nothing."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
