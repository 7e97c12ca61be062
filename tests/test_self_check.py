"""The self-check and the loader: what is not computed exactly is refused or falls back loudly; planted faults."""

import itertools
import json
from dataclasses import replace

import pytest
import tiny
import torch
from oracles import plain_logps, tree
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma2Config, Gemma2ForCausalLM

from favor.data.batches import build
from favor.errors import CheckpointError, NumericsError
from favor.model import attention, layout
from favor.model.adapters import LoraSettings
from favor.model.heads import load_scalar_model, settle_scores
from favor.model.layout import settle
from favor.model.load import ModelConfig, frozen_copy, load_policy, make_policy
from favor.model.logprobs import response_logps

CONFIG = ModelConfig(path="tiny", device="cpu")


def policy_of(model, **settings):
    return make_policy(model, tiny.tokenizer(), CONFIG.model_copy(update=settings))


def trees(longest=20):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, tiny.VOCAB, (400,), generator=generator).tolist()
    near = [tree(ids[i : i + 9], [ids[20 + i : 27 + i], ids[40 + i : 52 + i]], [(0, 1)], 2 * i) for i in range(3)]
    return [*near, tree(ids[100:112], [ids[120 : 120 + longest], ids[300:305]], [(0, 1)], 6)]


def enlarge(model, factor=4):
    """Weights large enough for attention and log-probs to differ between tokens, as a trained model's do."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)


def assert_exact(policy, model, data):
    """Log-probs of a settled policy against plain transformers, one unpadded row each."""
    with torch.no_grad():
        got, truth = response_logps(policy, build(data, policy.layout)), plain_logps(model, data)
    assert float(((got - truth).abs() / (1 + truth.abs())).max()) < 1e-5


def capped():
    """A Gemma 2 whose logits are as large as a real one's: its cap at 30 changes them by many nats."""
    torch.manual_seed(0)
    made = Gemma2ForCausalLM(
        Gemma2Config(**tiny._GQA, head_dim=8, final_logit_softcapping=30.0, sliding_window=256)
    ).eval()
    with torch.no_grad():
        made.model.embed_tokens.weight.mul_(60)
    return made


@pytest.mark.parametrize("asked", ["auto", "rows"])
def test_a_cap_on_the_logits_is_never_passed_over(asked):
    """Rows with the plain linear head are hundreds of nats off here; the check gives that head up, and says so."""
    model, data = capped(), trees()
    wrong = replace(policy_of(model), layout="rows")
    off = (response_logps(wrong, build(data, "rows")) - plain_logps(model, data)).abs()
    assert float(off.detach().max()) > 10
    policy, why = settle(policy_of(model), asked, data, train=True)
    assert policy.fast_head is None
    assert "own head is used" in why
    assert_exact(policy, model, data)


def test_a_wrong_gradient_costs_the_trees(monkeypatch):
    """Right log-probs with a wrong backward: only the comparison of gradients sees it."""
    right = attention._backward

    def wrong(*arguments):
        dq, dk, dv = right(*arguments)
        return dq, dk * 1.01, dv

    monkeypatch.setattr(attention, "_backward", wrong)
    assert settle(policy_of(tiny.model("llama")), "auto", trees())[0].layout == "tree"
    policy, why = settle(policy_of(tiny.model("llama")), "auto", trees(), train=True)
    assert policy.layout == "rows"
    assert "FALL-BACK" in why
    assert "gradients of" in why


def of_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")


def of_the_machine():
    torch.empty(1 << 50)


def of_another_process():
    raise RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:456] Connection closed by peer [127.0.0.1]:9")


@pytest.mark.parametrize("fault", [of_a_gpu, of_the_machine, of_another_process])
@pytest.mark.parametrize("name", [None, attention.NAME])
def test_memory_that_ends_and_processes_that_are_lost_say_nothing_of_the_model(fault, name):
    """Neither when plain transformers computes it, nor as a reason against trees; ranks.world tells of lost processes."""
    model = tiny.model("llama")
    model.model.layers[0].register_forward_pre_hook(
        lambda *_: fault() if name in (None, model.config._attn_implementation) else None
    )
    with pytest.raises(RuntimeError, match="out of memory|allocate memory|closed by peer"):
        settle(policy_of(model), "auto", trees())


@pytest.mark.parametrize("fault", [of_a_gpu, of_the_machine])
def test_memory_that_ends_while_a_model_is_read_is_no_damage_to_it(tmp_path, monkeypatch, fault):
    tiny.save(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *given, **named: fault())
    with pytest.raises(RuntimeError, match="out of memory|allocate memory"):
        load_policy(ModelConfig(path=str(tmp_path)))


def test_the_longest_row_is_checked_as_long_as_it_is(monkeypatch):
    """A short window that the reading of the config misses shows in rows beyond it alone."""
    monkeypatch.setattr(layout, "config_obstacle", lambda config, longest: None)
    torch.manual_seed(0)
    model = tiny.MistralForCausalLM(tiny.MistralConfig(**tiny._GQA, head_dim=8, sliding_window=200)).eval()
    enlarge(model)
    policy = policy_of(model)
    assert settle(policy, "auto", trees(60))[0].layout == "tree"
    policy, why = settle(policy, "auto", trees(270), train=True)
    assert policy.layout == "rows", why
    assert_exact(policy, model, trees(270))


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_depend_on_each_row_alone(kind):
    """Rows on both sides of the original length in one batch: each as if alone, in any order, the reference's copy too."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 5.0, 8.0]}
        rope |= factors | {"original_max_position_embeddings": 24}
    config = tiny.LlamaConfig(
        **(tiny._GQA | {"max_position_embeddings": 24 if kind == "dynamic" else 512}), rope_parameters=rope
    )
    torch.manual_seed(0)
    model = tiny.LlamaForCausalLM(config).eval()
    enlarge(model)
    data = trees(longest=60)
    with torch.no_grad():
        # plain transformers, a fresh model for every row, as "dynamic" remembers the longest it has seen
        truth = torch.cat(
            [plain_logps(fresh(model), [replace(t, response_ids=(r,))]) for t in data for r in t.response_ids]
        )
        mixed = response_logps(replace(policy_of(fresh(model)), layout="rows"), build(data, "rows"))
        policy, why = settle(policy_of(model), "auto", data, train=True)
        assert "depend on the length of a row" in why
        copy = frozen_copy(policy)
        for order in (data, data[::-1]):
            for one in (policy, copy):
                got = response_logps(one, build(order, "rows"))
                torch.testing.assert_close(got, truth if order is data else _reversed(truth), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(mixed, truth, rtol=1e-6, atol=1e-4)


def _reversed(truth_R):
    return torch.cat([truth_R[i : i + 2] for i in range(len(truth_R) - 2, -1, -2)])


def fresh(model):
    made = tiny.LlamaForCausalLM(model.config)
    made.load_state_dict(model.state_dict())
    return made.eval()


def test_without_the_row_by_row_positions_a_batch_would_be_wrong(monkeypatch):
    """The planted fault of the test above: the check must not accept a batch whose positions mix."""
    monkeypatch.setattr("favor.model.load.row_by_row", lambda model: None)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 5.0, 8.0]}
    rope |= {"original_max_position_embeddings": 24, "factor": 4.0}
    torch.manual_seed(0)
    model = tiny.LlamaForCausalLM(tiny.LlamaConfig(**tiny._GQA, rope_parameters=rope)).eval()
    enlarge(model, 8)
    with pytest.raises(NumericsError, match="rows of several lengths"):
        settle(policy_of(model), "auto", trees(longest=60))


def test_a_bidirectional_model_is_refused():
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    sizes = {k: v for k, v in tiny._SIZES.items() if k != "bos_token_id"}
    model = BertLMHeadModel(BertConfig(**sizes, is_decoder=False)).eval()
    with pytest.raises(CheckpointError, match="reads later tokens too"):
        settle(policy_of(model), "rows", trees())


def test_a_machine_that_does_not_repeat_itself_is_not_the_models_fault(monkeypatch):
    """One wrong forward among many: the model is not called bidirectional for it."""
    from favor.model import layout

    calls, plain = itertools.count(), layout.plain_logits
    monkeypatch.setattr(layout, "plain_logits", lambda *args: plain(*args) * (1.01 if next(calls) == 1 else 1))
    with pytest.raises(NumericsError, match="computed twice gave log-probs .* does not compute reliably"):
        settle(policy_of(tiny.model("llama")), "rows", trees())
    settle(policy_of(tiny.model("llama")), "rows", trees())


def test_an_id_without_an_embedding_is_refused():
    beyond = [*trees(), tree([5, 6], [[7, tiny.VOCAB + 3], [8]], [(0, 1)], 8)]
    with pytest.raises(CheckpointError, match=f"gives the id {tiny.VOCAB + 3}"):
        settle(policy_of(tiny.model("llama")), "auto", beyond)


def spoil_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def renamed(weights):
    weights["model.layers.1.mlp.wrong.weight"] = weights.pop("model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("change", "layers", "named"),
    [
        (renamed, 2, ["lack model.layers.1.mlp.up_proj.weight", "no place for model.layers.1.mlp.wrong.weight"]),
        (lambda weights: weights.pop("model.norm.weight"), 2, ["lack model.norm.weight"]),
        (lambda weights: None, 3, ["lack model.layers.2.", "and 6 more"]),
        (lambda weights: None, 1, ["no place for model.layers.1."]),
        (
            lambda weights: weights.update({"model.norm.weight": torch.ones(16)}),
            2,
            ["in another shape model.norm.weight"],
        ),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused_by_name(tmp_path, change, layers, named):
    tiny.save(tmp_path)
    spoil_weights(tmp_path, change)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers, "layer_types": None}))
    with pytest.raises(CheckpointError) as found:
        load_policy(ModelConfig(path=str(tmp_path)))
    assert all(part in str(found.value) for part in [str(tmp_path), *named]), found.value


def test_a_reward_model_needs_a_trained_head_of_one_number(tmp_path):
    """A plain LM is the start of one (its scores 0), and scores nothing; a classifier of three labels is neither."""
    tiny.save(tmp_path / "lm")
    config = ModelConfig(path=str(tmp_path / "lm"))
    with pytest.raises(CheckpointError, match="without a trained score"):
        load_scalar_model(config)
    policy = load_scalar_model(config, fresh=True)
    head = policy.causal_lm.score.weight
    settled, why = settle_scores(policy, "auto", trees(), train=True)
    assert settled.layout == "tree", why
    assert not head.any(), "the check puts a random head in, and takes it out again"
    three = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=3, dtype=torch.float32)
    three.save_pretrained(tmp_path / "three")
    tiny.tokenizer().save_pretrained(tmp_path / "three")
    for fresh_start in (True, False):
        with pytest.raises(CheckpointError, match="a classifier of 3 labels"):
            load_scalar_model(ModelConfig(path=str(tmp_path / "three")), fresh=fresh_start)


def test_a_zero_head_does_not_hide_a_wrong_backbone(monkeypatch):
    """All scores are 0 with a head of zeros: a wrong attention must be seen all the same."""
    from favor.model.heads import _LM_HEAD

    assert "lm_head.weight" in _LM_HEAD
    monkeypatch.setattr(attention, "parts", lambda nodes: (p for p in _PARTS(nodes) if p.causal))
    torch.manual_seed(0)
    made = tiny.model("llama")
    from transformers import LlamaForSequenceClassification

    scorer = LlamaForSequenceClassification(made.config.__class__(**made.config.to_dict() | {"num_labels": 1}))
    scorer.model.load_state_dict(made.model.state_dict())
    with torch.no_grad():
        scorer.score.weight.zero_()
    policy = policy_of(scorer.eval())
    policy.causal_lm.config.pad_token_id = 0
    settled, why = settle_scores(policy, "auto", trees())
    assert settled.layout == "rows"
    assert "scores" in why


_PARTS = attention.parts


def test_bfloat16_says_what_it_costs_and_lora_is_checked_too():
    data = trees()
    policy, why = settle(policy_of(tiny.model("llama"), dtype="bfloat16"), "auto", data, train=True)
    assert policy.compute_dtype == torch.bfloat16
    truth = plain_logps(tiny.model("llama"), [layout._cut(t) for t in data[:2]]).detach()
    with torch.no_grad():
        off = (response_logps(policy, build([layout._cut(t) for t in data[:2]], "tree")) - truth).abs()
    assert float(off.max()) > 1e-3
    assert f"bfloat16 costs {float(off.mean()):.2g} nats" in why
    lora = settle(policy_of(tiny.model("llama"), lora=LoraSettings(rank=2)), "auto", data, train=True)[0]
    assert lora.layout == "tree"


def test_sampling_computes_in_what_was_asked_for():
    """model.dtype reaches the sampler too: bfloat16 products change some logits, so an option is not passed over."""
    from favor.model.sample import SampleConfig, sample

    prompts, seeds = [[5, 6, 7, 8]] * 64, list(range(64))
    settings = SampleConfig(max_new_tokens=60, batch=64)
    drawn = {
        d: sample(policy_of(tiny.model("llama"), dtype=d), prompts, seeds, settings) for d in ("float32", "bfloat16")
    }
    assert drawn["float32"] == sample(policy_of(tiny.model("llama")), prompts, seeds, settings)
    assert drawn["float32"] != drawn["bfloat16"]


def test_sampling_beyond_the_positions_of_a_model_is_refused():
    from favor.errors import ConfigError
    from favor.model.sample import SampleConfig, sample

    with pytest.raises(ConfigError, match="has no positions for 525 tokens"):
        sample(policy_of(tiny.model("gpt2")), [[5] * 515], [0], SampleConfig(max_new_tokens=10))


def adapter_kinds():
    from peft import IA3Config, LoraConfig

    task = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    return {
        "lora": LoraConfig(**task),
        "dora": LoraConfig(**task, use_dora=True),
        "head kept whole": LoraConfig(**task, modules_to_save=["lm_head"]),
        "token rows": LoraConfig(**task, trainable_token_indices=[5, 7]),
        "ia3": IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "on a tied table": LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"]),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", adapter_kinds())
def test_a_start_from_an_adapter_is_the_adapted_model_and_is_saved_as_one(tmp_path, kind):
    """What peft computes is what is loaded, what is saved loads in plain transformers with every weight; else it is refused."""
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from favor.train.loop import save_model

    tiny.save(tmp_path / "base")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter_kinds()[kind])
    with torch.no_grad():
        for number, parameter in enumerate(p for p in adapted.parameters() if p.requires_grad):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    adapted.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    config = ModelConfig(path=str(tmp_path / "adapter"))
    if kind == "on a tied table":
        with pytest.raises(CheckpointError, match="cannot be merged into the base exactly"):
            load_policy(config)
        return
    truth = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    policy, ids = load_policy(config), torch.arange(5, 25)[None]
    save_model(policy, tmp_path / "saved")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        expected = truth(ids).logits
        torch.testing.assert_close(policy.model(ids).logits, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again.eval()(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert all(p.requires_grad for p in policy.model.parameters())


def test_sft_with_nothing_preferred_is_one_line(tmp_path):
    from favor.config import load
    from favor.errors import DataError
    from favor.train.sft import SftConfig, sft

    tiny.save(tmp_path / "model")
    rows = [
        {"prompt": "Film?", "completion": "bad", "label": False},
        {"prompt": "Film 2?", "completion": "b", "label": False},
    ]
    (tmp_path / "down.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"run={tmp_path / 'run'}", f"model.path={tmp_path / 'model'}", f"data.train={tmp_path / 'down.jsonl'}"]
    with pytest.raises(DataError, match=r"down.jsonl: no response to learn from"):
        sft(load(SftConfig, None, words), lambda root: quiet_session(root))


def quiet_session(root):
    from rich.console import Console

    from favor.ranks import World
    from favor.run import RunFolder
    from favor.stop import StopRequest
    from favor.train.session import Session

    return Session(RunFolder(root), World(), Console(quiet=True), StopRequest())
