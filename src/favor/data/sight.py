"""What a model's own processor makes of pictures: the tokens that stand for them in a prompt, and the numbers that the model reads.

In: rendered prompts with a placeholder for each picture. Out: the same with every picture's tokens, as the processor writes them;
pixels, a picture at a time, from its file. Next: tokenize.py.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from favor.data.pictures import opened, pictures_of
from favor.data.readers import RowError
from favor.data.render import Rendered
from favor.data.types import Picture, Text
from favor.errors import DataError
from favor.guard import sha

# the cheapest way to resize, by Pillow's number: the cuts of a picture depend on its size alone
_NEAREST = 0


@dataclass(frozen=True)
class Sight:
    """A processor of transformers. token: the text of the placeholder, and of a part of a picture; token_id: its id."""

    processor: Any
    token: str
    token_id: int

    @cached_property
    def identity(self) -> str:
        """A hash of what decides tokens and pixels."""
        made, kind = self.processor.image_processor.to_dict(), type(self.processor.image_processor).__name__
        return sha(json.dumps([kind, self.processor.image_seq_len, self.token, made], sort_keys=True, default=str))

    @cached_property
    def _known(self) -> dict[tuple[int, int], str]:
        return {}

    def text_of(self, picture: Picture) -> str:
        """What stands for a picture in a prompt: its tiles, with their rows and columns."""
        size = (picture.height, picture.width)
        if size not in self._known:
            from PIL import Image

            # not as an array, of which a processor would guess where the colours are
            blank = Image.new("RGB", (picture.width, picture.height))
            self._known[size] = self._text(self._processed(blank, resample=_NEAREST, do_normalize=False))
        return self._known[size]

    def written(self, rendered: Rendered, prompt: Text) -> Rendered:
        """The texts with every placeholder replaced. Raises RowError when there are not as many of them as pictures."""
        texts = [self.text_of(picture) for picture in pictures_of(prompt)]
        whole = self._replaced(rendered.prompt, texts)
        longer = len(whole) - len(rendered.prompt)
        full = tuple(tuple(self._replaced(text, texts) for text in each) for each in rendered.full)
        gaps = tuple(tuple((low + longer, high + longer) for low, high in each) for each in rendered.gaps)
        return rendered._replace(prompt=whole, full=full, gaps=gaps)

    def placed(self, prompt: Text, prompt_ids: Sequence[int], responses: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Fields of a TokenTree: the pictures, with how many tokens each has. Raises RowError when the ids have others."""
        found = [p._replace(tokens=self.text_of(p).count(self.token)) for p in pictures_of(prompt)]
        said = any(token in (self.token_id, ~self.token_id) for ids in responses for token in ids)
        if said or sum(token == self.token_id for token in prompt_ids) != sum(picture.tokens for picture in found):
            raise RowError(f"its tokens have not as many {self.token} as its pictures have parts", "round_trip")
        return {"pictures": tuple(found), "picture_id": self.token_id} if found else {}

    def pixels(self, picture: Picture) -> tuple[Tensor, Tensor]:
        """pixel_values float32 [1, tiles, 3, height, width] and their mask, int64. Raises DataError for a file that changed."""
        made = self._processed(opened(picture), return_tensors="pt")
        if (text := self._text(made)) != self.text_of(picture):
            raise DataError(f"{picture.path}: is cut into other tiles than its size says ({len(text)} characters)")
        return made["pixel_values"], made["pixel_attention_mask"]

    def _processed(self, image: Any, **how: Any) -> Any:
        return self.processor.image_processor(images=[[image]], return_row_col_info=True, **how)

    def _text(self, made: Any) -> str:
        return self.processor.replace_image_token({"rows": made["rows"], "cols": made["cols"]}, 0)

    def _replaced(self, text: str, texts: Sequence[str]) -> str:
        pieces = text.split(self.token)
        if len(pieces) - 1 != len(texts):
            raise RowError(
                f"the rendered row has {len(pieces) - 1} times {self.token} and {len(texts)} pictures: its template must write one "
                "for each, and no text may hold it"
            )
        return pieces[0] + "".join(made + piece for made, piece in zip(texts, pieces[1:], strict=True))
