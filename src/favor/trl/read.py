"""A configuration of TRL as a file -> its names and values: Python (read, never run), YAML or JSON.

In: a script with a call of DPOConfig, a dict, a YAML file of TRL's command line, saved JSON. Out: Given. Next: recipe.py.
"""

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from favor.errors import ConfigError, clipped

# bytes: more must be another kind of file
_LARGEST = 1 << 20
# files that run code when Python opens them
_RUNS = (".bin", ".pt", ".pth", ".pkl")
# calls whose keywords are read; LoraConfig's have other names on TRL's command line
_CALLS = ("DPOConfig", "TrainingArguments", "ModelConfig", "ScriptArguments", "LoraConfig")
_LORA = {"r": "lora_r", "target_modules": "lora_target_modules"}


@dataclass(frozen=True)
class Given:
    """Names of TRL with their values, and with the text of what would have to be run to know it."""

    values: dict[str, Any] = field(default_factory=dict[str, Any])
    computed: dict[str, str] = field(default_factory=dict[str, str])


def read_config(path: Path) -> Given:
    """Raises ConfigError for a file that is not there, would run code, or holds no configuration."""
    if path.suffix in _RUNS:
        raise ConfigError(
            f"{path}: files of this kind run code when they are opened, so it is not; in Python, "
            "json.dump(args.to_dict(), open('args.json', 'w')) writes what is in it, and args.json is read here"
        )
    text = _text(path)
    if path.suffix in (".yaml", ".yml"):
        found = _yaml(path, text)
    elif path.suffix == ".json":
        found = _json(path, text)
    else:
        found = _python(path, text)
    if not found.values and not found.computed:
        raise ConfigError(f"{path}: holds no setting; give a call of DPOConfig, or a dict of its arguments")
    return found


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST + 1)
        if len(raw) > _LARGEST:
            raise ConfigError(f"{path}: larger than {_LARGEST} bytes, so it is no configuration; name another file")
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a file with a DPOConfig") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; name a Python, YAML or JSON file") from None


def _json(path: Path, text: str) -> Given:
    try:
        return _object(path, json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error}); fix it") from None


def _yaml(path: Path, text: str) -> Given:
    try:
        import yaml  # not ours: it comes with transformers
    except ImportError:
        raise ConfigError(f"{path}: reading YAML needs PyYAML; pip install pyyaml, or write the file as JSON") from None
    try:
        return _object(path, yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())[:200]}); fix it") from None


def _object(path: Path, found: Any) -> Given:
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds a {type(found).__name__}, expected names with values; write them as a dict")
    return Given({str(name): value for name, value in found.items()})


def _python(path: Path, text: str) -> Given:
    try:
        module = ast.parse(text, str(path))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not Python ({error}); give a script with DPOConfig, or .yaml or .json") from None
    if len(module.body) == 1 and isinstance(module.body[0], ast.Expr) and isinstance(module.body[0].value, ast.Dict):
        whole = module.body[0].value
        pairs = [(k.value, v) for k, v in zip(whole.keys, whole.values, strict=True) if isinstance(k, ast.Constant)]
        return _given([(str(name), value) for name, value in pairs], {})
    calls = [node for node in ast.walk(module) if isinstance(node, ast.Call) and _called(node) in _CALLS]
    for name in _CALLS:
        several = [call.lineno for call in calls if _called(call) == name]
        if len(several) > 1:
            raise ConfigError(
                f"{path}: calls {name} in lines {several[0]} and {several[1]}; leave one of them in the file"
            )
    return _given([pair for call in calls for pair in _keywords(call)], _constants(module))


def _called(call: ast.Call) -> str:
    """The last part of a call's name: DPOConfig of trl.DPOConfig(...)."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)


def _keywords(call: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    lora = _called(call) == "LoraConfig"
    if lora:
        yield "use_peft", ast.Constant(value=True)
    for keyword in call.keywords:
        name = keyword.arg or "**"
        yield (_LORA.get(name, name) if lora else name), keyword.value


def _constants(module: ast.Module) -> dict[str, Any]:
    """Names that are set once in the file, to a value that stands there."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
    return {name: value.value for name, (value, *more) in found.items() if not more and isinstance(value, ast.Constant)}


def _given(pairs: list[tuple[str, ast.expr]], constants: dict[str, Any]) -> Given:
    found = Given()
    for name, node in pairs:
        if isinstance(node, ast.Name) and node.id in constants:
            found.values[name] = constants[node.id]
            continue
        try:
            found.values[name] = ast.literal_eval(node)
        except (ValueError, TypeError, RecursionError):
            found.computed[name] = clipped(" ".join(ast.unparse(node).split()), 80)
    return found
