"""The prompts of any file that favor reads: what sampling, PPO and win rates start from.

In: a source of rows. Out: distinct prompts in order of appearance, with their row numbers. Next: tokenize.py.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from favor.config import STRICT
from favor.data.formats import FORMATS, RowError, recognise
from favor.data.formats.columns import like, named
from favor.data.formats.fields import TEMPLATE_KWARGS, as_text, checked_texts, joined_parts, refuse_pictures, shown
from favor.data.sources import read_objects
from favor.data.tokenize import TokensConfig, prompt_encoder
from favor.data.types import Text
from favor.errors import DataError

_AS_THEY_ARE: Mapping[str, str] = MappingProxyType({})
NumberedPrompts = list[tuple[int, Text]]


class PromptTokens(BaseModel):
    """Section [tokens] of what starts from prompts alone, which are never cut: how their text becomes token ids."""

    model_config = STRICT
    template: Literal["auto", "chat", "plain"] = "auto"
    """chat: the tokenizer's; plain: text as it is; auto: chat where the tokenizer has a template."""
    special_text: Literal["refuse", "allow"] = "refuse"
    """Whether rows that hold the text of a special token or turn mark are refused as forgeries."""

    @property
    def full(self) -> TokensConfig:
        """The same, where responses follow."""
        return TokensConfig(**self.model_dump())


def read_prompts(
    source: str, split: str, limit: int | None = None, columns: Mapping[str, str] = _AS_THEY_ARE
) -> NumberedPrompts:
    """(row number, prompt) of every distinct prompt; a row needs a prompt column, or be of a preference format.

    columns: our names of the columns that have others in the file.

    Raises DataError for a row without a usable prompt, and when there is none at all.
    """
    seen: dict[str, tuple[int, Text]] = {}
    for number, prompt, _ in prompt_rows(source, split, columns):
        seen.setdefault(json.dumps(prompt, sort_keys=True), (number, prompt))
        if limit is not None and len(seen) >= limit:
            break
    return list(seen.values())


def prompt_rows(
    source: str, split: str, columns: Mapping[str, str] = _AS_THEY_ARE
) -> Iterator[tuple[int, Text, dict[str, Any]]]:
    """(row number, prompt, the row under our names) of every row, equal prompts too. Raises DataError as `read_prompts` does."""
    empty = True
    for number, row in read_objects(source, split):
        empty = False
        try:
            ours = named(row, columns, None)
            prompt = _prompt(ours)
        except RowError as error:
            raise DataError(f"{source}, row {number}: {_remedied(error, row)}") from None
        yield number, prompt, ours
    if empty:
        raise DataError(f"{source}: nothing to use: it holds no rows; name a file with rows")


def encode_prompts(
    source: str,
    prompts: NumberedPrompts,
    tokenizer: PreTrainedTokenizerBase,
    tokens: TokensConfig,
    variables: Sequence[Mapping[str, Any]] = (),
) -> list[tuple[int, ...]]:
    """Token ids of each prompt. variables: what the template is given beside each, such as tools.

    Raises DataError naming the row of one that cannot be rendered.
    """
    encode = prompt_encoder(tokenizer, tokens)
    found: list[tuple[int, ...]] = []
    for (number, prompt), given in zip(prompts, variables or repeat({}, len(prompts)), strict=True):
        try:
            found.append(encode(prompt, given))
        except RowError as error:
            raise DataError(f"{source}, row {number}: {error}; fix the row") from None
    return found


def sample_seeds(seed: int, groups: Sequence[int], each: int) -> list[int]:
    """One seed per sample: of the run's seed, the prompt's place and the sample's number alone."""
    return [((seed * 1_000_003 + group) * 1009 + k) % (1 << 62) for group in groups for k in range(each)]


def prompt_of(row: dict[str, Any]) -> Text:
    """The column prompt of a row that need not be of a preference format. Raises RowError."""
    refuse_pictures(row)
    prompt = as_text(row.get("prompt"), "prompt")
    checked_texts(prompt)
    return prompt


def sample_text(value: Any, name: str) -> str:
    """The text of a sample, which may be blank: text as it is, or the content of one assistant turn. Raises RowError."""
    value = joined_parts(value, name)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = joined_parts(value.get("content"), f"{name}.content")
    if not isinstance(value, str):
        raise RowError(f"{name} holds {shown(value)}, expected text or the turn of an assistant")
    checked_texts(value)
    return value


def _remedied(error: RowError, row: Mapping[str, Any]) -> str:
    if not error.of_names:
        return str(error)
    held = f"no prompt (text or messages): its columns are {', '.join(row) or 'none'}"
    texts = [name for name, value in row.items() if isinstance(value, str) and " " in value]
    named_so = like("prompt", row) or (texts[0] if len(texts) == 1 else "COLUMN")
    return f"{held}; name the one that holds it: 'columns={{prompt={json.dumps(named_so, ensure_ascii=False)}}}'"


def _prompt(row: dict[str, Any]) -> Text:
    if row.get(TEMPLATE_KWARGS):
        raise RowError(
            f"{TEMPLATE_KWARGS} is not read where answers are sampled; set template_kwargs of the model for all rows"
        )
    if row.get("prompt") is None:
        return FORMATS[recognise(row)](row).prompt
    return prompt_of(row)
