"""`favor export`: a run's model as one folder that other tools load, and, where that is asked for, on the hub.

In: ExportConfig, the run's folder. Out: weights (safetensors, or GGUF with an Ollama Modelfile), tokenizer, model card; written
whole or not at all, after what was written has been loaded again and gives the run's log-probs. Next: gguf.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from pydantic import BaseModel, Field, model_validator
from transformers import AutoModelForCausalLM

from favor.config import STRICT
from favor.data.tokenize import TokensConfig, prompt_encoder
from favor.errors import CheckpointError, ConfigError, first_line
from favor.export.card import card
from favor.export.gguf import check_gguf, modelfile, write_gguf
from favor.model.load import ModelConfig, Policy, load_policy
from favor.model.logprobs import plain_logits
from favor.model.sample import SampleConfig, sample
from favor.rewards.model import RunRecipe, read_run
from favor.run import RunFolder, atomic_folder, opened, write_json, write_text

# what says that a folder was made here, so that it may be replaced
MARK = ".favor-export.json"
GGUF = "model.gguf"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Mean difference of a token's log-prob, nats, that a number format may cost. 8 bits of mantissa (bfloat16) cost some hundredths.
_MOST = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1, "q8_0": 0.1}
_SAMPLES = 4


class ExportConfig(BaseModel):
    """A recipe for `favor export`."""

    model_config = STRICT
    run: str
    """A finished run of a training command; adapters are merged into their base."""
    out: str
    """The folder to write; it must not be there yet."""
    format: Literal["safetensors", "gguf"] = "safetensors"
    """safetensors: for transformers, vLLM and others; gguf: for llama.cpp and Ollama, with a Modelfile."""
    dtype: Literal["bfloat16", "float16", "float32", "q8_0"] = "bfloat16"
    """The numbers that are stored; q8_0 (8 bits) is for gguf alone."""
    check_tokens: int = Field(default=48, ge=1, le=10_000)
    """Tokens of each of the 4 samples by which what was written is compared with the run's model."""
    overwrite: bool = False
    """Replace a folder that favor export made before."""
    push: str | None = None
    """Upload the folder to this repository of the hub (owner/name); nothing leaves the machine without it."""
    public: bool = False
    """Whether a repository that push makes can be seen by everybody."""

    @model_validator(mode="after")
    def _parts_go_together(self) -> Self:
        if self.dtype == "q8_0" and self.format != "gguf":
            raise ValueError("dtype=q8_0 is a number format of gguf; set format=gguf, or another dtype")
        if self.public and self.push is None:
            raise ValueError("public is read only with push; set push=OWNER/NAME, or remove it")
        return self


class Exported(NamedTuple):
    """What was made. difference: mean of |log-prob of a token, as written - of the run|, nats, over `tokens` sampled tokens."""

    folder: Path
    difference: float
    tokens: int
    notes: tuple[str, ...]
    address: str | None


def export(config: ExportConfig, say: Callable[[str], None] = lambda text: None) -> Exported:
    """Write the folder; upload it if that is asked for.

    Raises CheckpointError for a run without a model, or when what was written does not give its log-probs; ConfigError for a
    folder that is there already, a model that GGUF has no place for here, or a hub that refuses.
    """
    folder, recipe = read_run(config.run)
    out = Path(config.out)
    _check_out(out, overwrite=config.overwrite)
    with opened(folder):
        policy = load_policy(ModelConfig(path=str(folder.model), trust_remote_code=recipe.model.trust_remote_code))
        if config.format == "gguf":
            check_gguf(policy)
        say(f"loaded {folder.model}; writing {config.format} in {config.dtype}")
        made = _write(config, folder, recipe, policy, out)
    return made if config.push is None else made._replace(address=_push(config, out))


def _write(config: ExportConfig, folder: RunFolder, recipe: RunRecipe, policy: Policy, out: Path) -> Exported:
    # sampled from the model itself: text as it writes, whatever it was trained on
    prompt = prompt_encoder(policy.tokenizer, TokensConfig(template=recipe.tokens.template))("Tell me something.")
    settings = SampleConfig(max_new_tokens=config.check_tokens)
    samples = sample(policy, [prompt] * _SAMPLES, range(_SAMPLES), settings)
    before = _logps(policy, prompt, samples)
    with atomic_folder(out) as aside:
        policy.tokenizer.save_pretrained(aside)
        notes = _weights(config, policy, aside)
        after = _logps(_written(config, policy, aside), prompt, samples)
        count = sum(map(len, samples))
        difference = sum(abs(a - b) for a, b in zip(before, after, strict=True)) / count
        _refuse_different(config, difference)
        write_text(aside / "README.md", card(folder, recipe, config.dtype, GGUF if config.format == "gguf" else None))
        write_json(aside / MARK, {"made_by": "favor export", "dtype": config.dtype})
    return Exported(out, difference, count, tuple(notes), None)


def _weights(config: ExportConfig, policy: Policy, folder: Path) -> list[str]:
    """Write them; what the user should know of it."""
    if config.format == "gguf":
        write_gguf(policy, folder, GGUF, config.dtype)
        text, notes = modelfile(policy.tokenizer, policy.end_ids, GGUF)
        write_text(folder / "Modelfile", text)
        return notes
    # what it is compared with has been measured: it need not stay float32
    model: Any = policy.causal_lm
    model.to(_DTYPES[config.dtype]).save_pretrained(folder)
    return []


def _written(config: ExportConfig, policy: Policy, folder: Path) -> Policy:
    """The model as others will load it, computed in float32."""
    if config.format == "safetensors":
        return load_policy(ModelConfig(path=str(folder)))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    return replace(policy, model=model.eval().to(policy.device))


def _logps(policy: Policy, prompt: Sequence[int], samples: Sequence[Sequence[int]]) -> list[float]:
    """Log-prob of each token of each sample, nats, by plain transformers."""
    found: list[float] = []
    with torch.no_grad():
        for ids in samples:
            whole = torch.tensor([[*prompt, *ids]], device=policy.device)
            logps = plain_logits(policy, whole, len(ids) + 1)[:-1].log_softmax(-1)
            found += logps.gather(1, torch.tensor(ids, device=policy.device)[:, None])[:, 0].tolist()
    return found


def _refuse_different(config: ExportConfig, difference: float) -> None:
    if not difference <= _MOST[config.dtype]:
        raise CheckpointError(
            f"{config.run}: the {config.format} model in {config.dtype} gives other log-probs than the run's "
            f"({difference:.3g} nats a token on average), so it was not kept; try dtype=float32, and report this if it stays"
        )


def _check_out(out: Path, *, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir() or not (out / MARK).exists():
        raise ConfigError(f"{out}: is there already, and favor export did not make it; choose another out=FOLDER")
    if not overwrite:
        raise ConfigError(f"{out}: is there already; choose another out=FOLDER, or replace it with overwrite=true")


def _push(config: ExportConfig, out: Path) -> str:
    """Upload the folder. Raises ConfigError with what the hub said."""
    api, name = HfApi(), str(config.push)
    try:
        address = api.create_repo(name, private=not config.public, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=out, ignore_patterns=[MARK])
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise ConfigError(
            f"push={name}: the hub refused ({first_line(error)}); log in with `hf auth login`, and check the name; the "
            f"folder {out} is whole and stays"
        ) from None
    return str(address)


def told(made: Exported) -> str:
    """What the command says at the end."""
    lines = [
        f"exported to {made.folder}; loaded again, its log-probs differ from the run's by {made.difference:.2g} nats a token "
        f"(mean over {made.tokens} sampled tokens)",
        *made.notes,
    ]
    if made.address:
        lines.append(f"uploaded to {made.address}")
    return "\n".join(lines)
