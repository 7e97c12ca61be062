"""The pictures of a row: found, looked at, and put into its prompt as marks, so that all that reads prompts tells them apart.

In: a row under our names and the folder of its file. Out: the row with a mark for every picture in the text of its prompt: what
the picture is (SHA-256, size) and where its file lies. Nothing is fetched from the web. Next: grow.py.
"""

import hashlib
import io
import json
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from favor.data import sources
from favor.data.formats.fields import PICTURES
from favor.data.readers import RowError
from favor.data.types import Message, Picture, Text, words_of
from favor.errors import DataError
from favor.run import cache_folder, whole_file

# characters that no text has (Unicode keeps them for the inside of a program) around what is said of a picture
_BEGIN, _END = "\ufdd0", "\ufdd1"
MARK = re.compile(f"{_BEGIN}([^{_BEGIN}{_END}]*){_END}")
# what Pillow raises for a file that is no picture, or a damaged one
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)
# Exif's number of how a picture is turned, and the ways that lay it on its side
_TURNED, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)
# fields of a content part that bring the picture along
_BROUGHT = ("image", "bytes", "path", "url")


def folder_of(source: str) -> Path | None:
    """The folder that relative paths in a source's rows start from; None where there is not one."""
    found = sources.files(source)
    if found is None:
        return Path(source).absolute() if Path(source).is_dir() else None
    folders = {path.parent.absolute() for path in found}
    return folders.pop() if len(folders) == 1 else None


def marked(row: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """The row with its pictures as marks in its prompt, each looked at.

    Placeholders {"type": "image"} take the pictures of the columns in order, or bring their own; texts without any get them in
    front of the first turn of the user, as TRL places them. Raises RowError.
    """
    given, rest = _given(row), {name: value for name, value in row.items() if name not in PICTURES}
    if not given and not any(_parts(value) for value in rest.values()):
        return rest
    if _BEGIN in json.dumps(rest, ensure_ascii=False, default=str):
        raise RowError(f"it holds the character U+{ord(_BEGIN):04X}, which stands for a picture here; take it out")
    files = [_seen(value, folder) for value in given]
    hosts = ["prompt"] if "prompt" in rest else [name for name, value in rest.items() if _is_conversation(value)]
    if files and not hosts:
        raise RowError("its pictures have no place: give a column prompt, or whole conversations as messages")
    found: dict[str, Any] = {}
    for name, value in rest.items():
        left = iter(files)
        found[name] = _filled(value, left, folder)
        # what a side repeats of the prompt has its pictures, too
        if name in hosts or _is_conversation(value):
            found[name] = _with_all(name, found[name], files, list(left))
    return found


def named(row: Mapping[str, Any], folder: Path | None) -> Iterator[str]:
    """The files that a row names, whether they are there or not; those that it holds itself are left out."""
    held = [part for value in row.values() for part in _parts(value)]
    for value in [*_given(row), *(_brought(part) for part in held)]:
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else None
        if isinstance(value, str) and not _on_the_web(value):
            yield str(_path(value, folder))


def digest_of(path: str) -> str:
    """SHA-256 of a file; "" where it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except (OSError, ValueError):
        return ""


def refuse_said(responses: Sequence[Text]) -> None:
    """Raises RowError for a picture in a response."""
    for place, response in enumerate(responses):
        if _BEGIN in words_of(response):
            raise RowError(
                "a picture stands in a response, and only text is scored; move it into the prompt", place=place
            )


def pictures_of(prompt: Text) -> tuple[Picture, ...]:
    """The pictures of a prompt, in their order."""
    return tuple(Picture(*json.loads(said)) for said in MARK.findall(words_of(prompt)))


def without_places(text: str) -> str:
    """A text whose marks say what the pictures are, and not where they lie."""
    return MARK.sub(lambda mark: f"{_BEGIN}{json.loads(mark[1])[0]}{_END}", text) if _BEGIN in text else text


def as_parts(turn: Message) -> Message:
    """A turn as templates of models that read pictures want it: its content is a list of parts."""
    if not isinstance(turn.get("content"), str):
        return turn
    # texts stand at even places
    pieces = enumerate(MARK.split(turn["content"]))
    parts = [{"type": "image"} if i % 2 else {"type": "text", "text": piece} for i, piece in pieces if i % 2 or piece]
    return {**turn, "content": parts or [{"type": "text", "text": ""}]}


def opened(picture: Picture) -> Any:
    """The picture as Pillow has it, upright, in RGB. Raises DataError when its file is not what it was when rows were read."""
    from PIL import Image
    from transformers.image_utils import load_image

    with sources.readable(Path(picture.path)):
        content = Path(picture.path).read_bytes()
    if hashlib.sha256(content).hexdigest() != picture.digest:
        raise DataError(f"{picture.path}: is another picture than when the rows were read; start again when it stays")
    return load_image(Image.open(io.BytesIO(content)))


def _given(row: Mapping[str, Any]) -> list[Any]:
    both = [name for name in PICTURES if row.get(name)]
    if len(both) > 1:
        raise RowError("it has pictures in both images and image; leave them in one")
    if not both:
        return []
    value = row[both[0]]
    return list(value) if isinstance(value, list | tuple) else [value]


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """The content parts of a value that are pictures."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)
    elif isinstance(value, dict) and "role" in value:
        yield from _parts(value.get("content"))
    elif isinstance(value, dict) and value.get("type") == "image":
        yield value


def _filled(value: Any, left: Iterator[Picture], folder: Path | None) -> Any:
    """The value with a text part in place of every picture's."""
    if isinstance(value, list | tuple):
        return [_filled(item, left, folder) for item in value]
    if isinstance(value, dict) and "role" in value:
        return {**value, "content": _filled(value.get("content"), left, folder)}
    if not isinstance(value, dict) or value.get("type") != "image":
        return value
    brought = _brought(value)
    picture = next(left, None) if brought is None else _seen(brought, folder)
    if picture is None:
        raise RowError("it has more places for pictures ({'type': 'image'}) than pictures; give one for each")
    return {"type": "text", "text": _mark(picture)}


def _with_all(name: str, value: Any, files: Sequence[Picture], left: Sequence[Picture]) -> Any:
    """The value, in which all pictures of the columns have their place. Raises RowError."""
    if not left:
        return value
    whole = "".join(map(_mark, files))
    if len(left) == len(files) and isinstance(value, str):
        return whole + value
    turns = value if isinstance(value, list) and all(isinstance(turn, dict) for turn in value) else []
    first = next((i for i, turn in enumerate(turns) if turn.get("role") == "user"), None)
    if len(left) == len(files) and first is not None and isinstance(turns[first].get("content"), str):
        return [*turns[:first], {**turns[first], "content": whole + turns[first]["content"]}, *turns[first + 1 :]]
    raise RowError(
        f"{name} has {len(files) - len(left)} places for pictures ({{'type': 'image'}}) and the row has {len(files)} pictures; "
        "give one for each"
    )


def _is_conversation(value: Any) -> bool:
    """Whether it is messages that do not begin with an answer."""
    turns: list[Any] = list(value) if isinstance(value, list | tuple) else []
    messages = bool(turns) and all(isinstance(turn, dict) for turn in turns)
    return messages and turns[0].get("role", "assistant") != "assistant"


def _brought(part: Mapping[str, Any]) -> Any:
    """The picture that a content part has itself, or None."""
    return next((part[name] for name in _BROUGHT if part.get(name) is not None), None)


def _mark(picture: Picture) -> str:
    return f"{_BEGIN}{json.dumps(picture[:4])}{_END}"


def _on_the_web(value: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]+:", value, re.IGNORECASE) is not None


def _path(value: str, folder: Path | None) -> Path:
    path = Path(value)
    if path.is_absolute():
        return path
    if folder is None:
        raise RowError(f"the picture {value[:80]!r} has no folder to start from; give its whole path")
    return folder / path


def _seen(value: Any, folder: Path | None) -> Picture:
    """A picture that can be read, by a path, by bytes, or as `datasets` has it ({"bytes", "path"}). Raises RowError."""
    if isinstance(value, dict):
        value = next((value[name] for name in ("bytes", "path", "url") if value.get(name) is not None), None)
    if isinstance(value, bytes):
        what = hashlib.sha256(value).hexdigest()
        height, width = _look(value, "a picture in the row")
        return Picture(what, str(_stowed(value, what)), height, width)
    if not isinstance(value, str) or not value:
        raise RowError(f"a picture is given as {type(value).__name__}; expected the path of its file, or its bytes")
    if _on_the_web(value):
        raise RowError(
            f"the picture {value[:80]!r} is not a file: nothing is fetched from elsewhere; save it and name it"
        )
    path = _path(value, folder)
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RowError(f"the picture {path} cannot be read ({reason}); check the file") from None
    height, width = _look(content, f"the picture {path}")
    return Picture(hashlib.sha256(content).hexdigest(), str(path), height, width)


def _look(content: bytes, name: str) -> tuple[int, int]:
    """Height and width as it is seen, of a picture that can be decoded to its end. Raises RowError."""
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(content)) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning)
            width, height = image.size
            turned = image.getexif().get(_TURNED) in _ON_ITS_SIDE
            # JPEG's decoder then makes a small one of it, and reads it all the same
            image.draft("RGB", (64, 64))
            image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RowError(f"{name} has more pixels than a picture is believed to have; make it smaller") from None
    except _DAMAGED as error:
        raise RowError(f"{name} is no picture that can be read ({error}); write it again") from None
    return (width, height) if turned else (height, width)


def _stowed(content: bytes, what: str) -> Path:
    """Where the bytes of a row lie as a file, so that no run holds the pictures of all its rows."""
    path = cache_folder() / "pictures" / what[:2] / what
    if not path.exists() or path.stat().st_size != len(content):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as aside:
            aside.write_bytes(content)
    return path
