"""What split weights must give, each against one process; started with torchrun by test_split.py: FOLDER CASE ..."""

import json
import os
import sys
import threading
from itertools import product
from pathlib import Path

import psutil
import pytest
import test_invariance
import tiny
import torch
from rich.console import Console

from favor.eval.evaluate import EvalConfig, evaluate
from favor.losses.table import make_loss
from favor.model import logprobs, split
from favor.model.adapters import LoraSettings
from favor.model.layout import settle
from favor.model.load import ModelConfig, frozen_copy, load_policy, make_policy, sharded, weights_hash
from favor.model.logprobs import response_logps
from favor.model.room import memory_settings, peak
from favor.parts import assign_, whole
from favor.ranks import World, barrier, world
from favor.run import RunFolder
from favor.stop import StopRequest, stop_signals
from favor.train import checkpoint, moments, ppo, preference, reward, session, sft
from favor.train.loop import micro_batches
from favor.train.optim import AdamW, make_optimizer
from favor.train.reference import Reference, base_of, live
from favor.train.session import Session, TrainingState
from favor.train.step import Learner, step

ALONE = World()
MAKES = {
    # name -> family, and settings of the model
    "tied": ("llama", {}),
    "untied, biases": ("qwen2", {}),
    "gpt2, checkpointing": ("gpt2", {"gradient_checkpointing": True}),
    "adapters": ("llama", {"lora": LoraSettings(rank=3)}),
    "adapters, checkpointing": ("qwen3", {"lora": LoraSettings(rank=3), "gradient_checkpointing": True}),
}


def made(family, shard="none", **settings):
    """A settled policy: the same weights and adapters each time, split over the ranks or whole."""
    config = ModelConfig(path="tiny", **settings)
    policy = make_policy(tiny.model(family), tiny.tokenizer(), config)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 9)
    policy = sharded(policy, shard)
    return settle(policy, "auto", test_invariance.forest(), train=True)[0]


def updated(policy, trees, members, budget):
    """What two SGD steps by DPO against another model did, and the weights after them."""
    other = made("mistral")

    def ref_logps(batch):
        with torch.no_grad():
            return response_logps(other, batch)

    parameters = policy.trainable()
    learner = Learner(
        parameters,
        torch.optim.SGD(parameters.values(), lr=0.1),
        1.0,
        policy.device,
        members,
        split=policy.root is not None,
    )
    objective = preference.make_objective(make_loss("dpo", beta=0.2), policy, Reference(ref_logps, ""))
    done = [step(learner, micro_batches(trees, policy, budget, members), objective) for _ in range(2)]
    return done, {name: whole(p.detach()).clone() for name, p in parameters.items()}


def case_quick(folder, members):
    """The two most unlike models of `updates`."""
    case_updates(folder, members, names=("tied", "adapters, checkpointing"))


def case_updates(folder, members, shard="full", names=tuple(MAKES)):
    """Loss, statistics, norm and weights to 1e-5, over trees enough for all ranks, and one tree for all of them."""
    for name in names:
        family, settings = MAKES[name]
        for trees, budget in ((test_invariance.forest(), 40), (test_invariance.forest()[3:], 40)):
            parted, alone = made(family, shard, **settings), made(family, **settings)
            assert weights_hash(parted) == weights_hash(alone), name
            start = {n: p.detach().clone() for n, p in alone.trainable().items()}
            done, weights = updated(parted, trees, members, budget)
            expected, true = updated(alone, trees, ALONE, budget)
            moved = max(float((true[n] - start[n]).abs().max()) for n in start)
            for found, right in zip(done, expected, strict=True):
                close(found.grad_norm, right.grad_norm, name)
                for key, value in right.sums.items():
                    close(found.sums[key], value, f"{name}: {key}")
            for n in start:
                assert float((weights[n] - true[n]).abs().max()) <= 1e-5 * moved, (name, n)


def case_tiles(folder, members):
    """The head in tiles of three places, each computed again in the backward: every rank asks for the head as often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "_TILE_BYTES", 4 * tiny.VOCAB * 3)
        patch.setattr(logprobs, "_KEEP_BYTES", 0)
        case_updates(folder, members, names=("tied", "untied, biases"))


def case_hybrid(folder, members):
    """Two machines of half the ranks each."""
    os.environ["LOCAL_WORLD_SIZE"] = str(members.size // 2)
    case_updates(folder, members, "hybrid")


def case_bytes(folder, members):
    """Parameters, gradients and optimizer state of a rank are its share of them, up to the rounding of rows."""
    policy = made("llama", "full")
    parameters = policy.trainable()
    optimizer = make_optimizer(AdamW(), parameters)
    learner = Learner(parameters, optimizer, 1.0, policy.device, members, split=policy.root is not None)
    seen = []

    def held(*_):
        values = [v for p in parameters.values() for v in (p, p.grad, *optimizer.state[p].values()) if v is not None]
        seen.append(sum(v.to_local().nbytes for v in values if v.dim()))

    optimizer.register_step_post_hook(held)
    objective = preference.make_objective(make_loss("dpo"), policy, none())
    step(learner, micro_batches(test_invariance.forest(), policy, 40, members), objective)
    total = sum(4 * p.numel() for p in parameters.values()) * 4
    # a tensor of n rows is cut to ceil(n / ranks)
    rounding = sum(16 * p.numel() // p.shape[0] for p in parameters.values())
    assert total / members.size <= seen[0] + rounding, (seen, total)
    assert seen[0] <= total / members.size + rounding, (seen, total)
    assert rounding < total / members.size / 4, "the rounding must not hide what is not split"
    # nothing beside the parts outlives the step
    assert all(p.to_local().untyped_storage().nbytes() <= p.numel() * 4 for p in parameters.values())


def learning(policy, members):
    """AdamW on all weights, and a step of DPO against zeros."""
    parameters = policy.trainable()
    optimizer = make_optimizer(AdamW(lr=1e-3), parameters)
    learner = Learner(parameters, optimizer, 1.0, policy.device, members, split=policy.root is not None)
    objective = preference.make_objective(make_loss("dpo"), policy, none())
    cut = micro_batches(test_invariance.forest(), policy, 40, members)
    return learner, lambda: step(learner, cut, objective)


def session_in(folder, members):
    if members.is_main:
        folder.mkdir()
        (folder / "metrics.jsonl").touch()
    return Session(RunFolder(folder), members, Console(quiet=True), StopRequest())


def case_saved(folder, members):
    """A checkpoint, held until a further step is taken, is that of the step at whose end it was asked for.

    Also where the one rank of a machine holds all weights.
    """
    for how, here in (("full", members.size), ("hybrid", 1)):
        os.environ["LOCAL_WORLD_SIZE"] = str(here)
        learner, steps = learning(made("llama", how), members)
        steps()
        session, go, write = session_in(folder / f"saved-{how}", members), threading.Event(), checkpoint.save_file
        remembered = {
            f"{key}.{name}": value
            for name, parameter in learner.parameters.items()
            for key, value in moments.kept(learner.optimizer.state[parameter]).items()
        }
        expected = [
            {name: whole(tensor.detach()).clone() for name, tensor in tensors.items()}
            for tensors in (learner.parameters, remembered)
        ]
        checkpoint.save_file = lambda *given, go=go, write=write: go.wait(60) and write(*given)
        checkpoint.save(session, learner, TrainingState(step=1), 1)
        steps()
        go.set()
        session.background.wait()
        checkpoint.save_file = write
        barrier(members)
        stored = checkpoint.read(session.folder.checkpoints / "step-000001")
        for found, right in zip((stored.policy, stored.moments), expected, strict=True):
            assert found.keys() == right.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in right.items()), how


def case_memory(folder, members, shard="full"):
    """Most bytes that this rank held over two steps beside what it held before; and over a checkpoint."""
    memory_settings()
    # what is imported, and made once, on first use
    learning(made("llama", shard), members)[1]()
    before = psutil.Process().memory_info().rss
    policy = load_policy(ModelConfig(path=str(folder / "large")), 0, shard)
    policy, _ = settle(policy, "auto", test_invariance.forest(), train=True)
    learner, steps = learning(policy, members)
    steps()
    steps()
    found = {"steps": peak() - before}
    session = session_in(folder / f"memory-{shard}-{members.size}", members)
    checkpoint.save(session, learner, TrainingState(step=2), 1)
    session.background.wait()
    found["saved"] = peak() - before
    barrier(members)
    (session.folder.root / f"rank-{members.rank}.json").write_text(json.dumps(found))


def case_whole(folder, members):
    """The same without splitting."""
    case_memory(folder, members, "none")


def none():
    from favor.train import reference

    return reference.none()


def case_pieces(folder, members):
    """Read from files by rows: the weights, adapters and buffers of the model that is read whole, which nobody reads."""
    from favor.model import load

    whole_way = load.load_parts
    families = (("llama", None), ("qwen2", LoraSettings(rank=3)), ("gpt2", None), ("gpt_neox", None))
    for family, lora in (*families, ("llama", LoraSettings(rank=3, dora=True))):
        place = folder / f"pieces-{family}-{lora}"
        if members.is_main:
            tiny.model(family).save_pretrained(place, max_shard_size="9KB")
            tiny.tokenizer().save_pretrained(place)
        barrier(members)
        config = ModelConfig(path=str(place), lora=lora)
        # the files of gpt_neox name the head otherwise than the model does; DoRA measures the weights when it is made
        load.load_parts = whole_way if family == "gpt_neox" or (lora and lora.dora) else refused
        found = load.load_policy(config, 3, "full")
        load.load_parts = whole_way
        right = load.load_policy(config, 3)
        assert found.root is not None
        assert weights_hash(found) == weights_hash(right), family
        assert found.trainable().keys() == right.trainable().keys()
        for name, parameter in right.trainable().items():
            assert torch.equal(whole(found.trainable()[name].detach()), parameter), name
        for (a, mine), (b, theirs) in zip(found.model.named_buffers(), right.model.named_buffers(), strict=True):
            assert a == b
            assert torch.equal(mine, theirs), a
        assert found.causal_lm.generation_config.to_dict() == right.causal_lm.generation_config.to_dict()
        assert found.causal_lm.config.to_dict() == right.causal_lm.config.to_dict()
        head, table = found.causal_lm.get_output_embeddings(), found.causal_lm.get_input_embeddings()
        assert (head.weight is table.weight) == found.causal_lm.config.tie_word_embeddings
        settled, _ = settle(found, "auto", test_invariance.forest(), train=True)
        batch = micro_batches(test_invariance.forest(), settled, 1000, ALONE)[0]
        other, _ = settle(right, "auto", test_invariance.forest())
        assert (response_logps(settled, batch) - response_logps(other, batch)).abs().max() < 1e-4


def refused(*unused, **unread):
    raise AssertionError("read whole")


def case_bfloat16(folder, members):
    """Products in bfloat16: the numbers and the gradient of one process, all ranks computing the same batch."""
    for dtype, settings in product(("bfloat16", "bfloat16x2"), ({}, {"gradient_checkpointing": True})):
        policy, alone = (made("qwen2", shard, dtype=dtype, **settings) for shard in ("full", "none"))
        batch = micro_batches(test_invariance.forest(), policy, 1000, ALONE)[0]
        found, right = response_logps(policy, batch), response_logps(alone, batch)
        assert torch.equal(found, right)
        gradients = split.gradient(policy.trainable(), found.sum())
        for (name, parameter), theirs in zip(
            alone.trainable().items(), torch.autograd.grad(right.sum(), list(alone.trainable().values())), strict=True
        ):
            assert (
                float((whole(gradients[name]) / members.size - theirs).norm()) <= 1e-5 * float(theirs.norm()) + 1e-6
            ), name
            assert policy.trainable()[name].dtype == parameter.dtype == torch.float32


def case_kept(folder, members):
    """LoRA on a base kept in bfloat16: the numbers, bit for bit, and the gradient of one process; half the bytes are split."""
    on_kept(folder, members, "bfloat16")


def case_four_bits(folder, members):
    """The same on a base rounded to 4 bits (QLoRA)."""
    on_kept(folder, members, "nf4")


def on_kept(folder, members, weights):
    from favor.model import load

    place = folder / "kept"
    if members.is_main:
        model = tiny.model("llama")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        model.save_pretrained(folder / "wide")
        tiny.tokenizer().save_pretrained(folder / "wide")
        (model.bfloat16() if weights == "bfloat16" else model).save_pretrained(place)
        tiny.tokenizer().save_pretrained(place)
    barrier(members)
    for more in ({}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}):
        words = {"path": str(place), "lora": LoraSettings(rank=2), **more}
        right = load_policy(ModelConfig(**words, weights=weights), 3)
        # each rank reads its rows where files say that the numbers are bfloat16's
        whole_way = load.load_parts
        load.load_parts = refused if weights == "bfloat16" else whole_way
        found = load_policy(ModelConfig(**words, weights=weights), 3, "full")
        load.load_parts = whole_way
        assert found.root is not None
        assert weights_hash(found) == weights_hash(right)
        # from float32 files, read whole
        words["path"] = str(folder / "wide")
        assert weights_hash(load_policy(ModelConfig(**words, weights=weights), 3, "full")) == weights_hash(right)
        kept = [p for p in found.model.parameters() if p.dtype in (torch.bfloat16, torch.uint8)]
        assert len(kept) == 2 * 7 + 1, "the matrices of two layers, and the embedding that is the head too"
        assert sum(p.dtype == torch.uint8 for p in kept) == (2 * 7 if weights == "nf4" else 0)
        assert sum(p.to_local().numel() for p in kept) <= sum(p.numel() for p in kept) / members.size + 9 * 48
        found, right = (settle(one, "auto", test_invariance.forest(), train=True)[0] for one in (found, right))
        batch = micro_batches(test_invariance.forest(), found, 1000, ALONE)[0]
        # adapters begin at zero: the policy is its reference
        with torch.no_grad():
            assert torch.equal(response_logps(found, batch), live(base_of(found), "").logps(batch))
        for policy in (found, right):
            with torch.no_grad():
                for name, parameter in policy.trainable().items():
                    if "lora_B" in name:
                        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 9
                        assign_(parameter, noise)
        mine, theirs = response_logps(found, batch), response_logps(right, batch)
        assert torch.equal(mine, theirs)
        gradients = split.gradient(found.trainable(), mine.sum())
        expected = torch.autograd.grad(theirs.sum(), list(right.trainable().values()))
        for name, value in zip(right.trainable(), expected, strict=True):
            away = float((whole(gradients[name]) / members.size - value).norm())
            assert away <= 1e-5 * float(value.norm()) + 1e-6, name
    adapted = {"path": str(place), "lora": {"rank": 2}, "weights": weights}
    both("train", folder, members, f"on-{weights}", model=adapted)


def case_rounded(folder, members):
    """Split float32 masters whose layers read them in bfloat16: what autocast gives, to the bit, without its copies."""
    for family, more in (("llama", {}), ("qwen2", {"gradient_checkpointing": True}), ("gpt2", {})):
        found, left = [], []
        for weights in ("float32", "bfloat16"):
            policy = made(family, "full", dtype="bfloat16", weights=weights, **more)
            left.append(left_behind(policy))
            done, after = updated(policy, test_invariance.forest(), members, 40)
            found.append((*done, *after.values()))
        assert all(a == b if isinstance(a, tuple) else torch.equal(a, b) for a, b in zip(*found, strict=True)), family
        assert left[1] == 0, (family, left)
        assert more or left[0] > 0, (family, left)
    # read by rows, as the float32 weights are
    if members.is_main:
        recipe(folder)
    barrier(members)
    words = {"path": str(folder / "model"), "dtype": "bfloat16", "weights": "bfloat16"}
    found, right = (load_policy(ModelConfig(**words), 3, how) for how in ("full", "none"))
    assert found.root is not None
    assert found.kept_bytes == right.kept_bytes > 0
    found, right = (settle(one, "auto", test_invariance.forest(), train=True)[0] for one in (found, right))
    batch = micro_batches(test_invariance.forest(), found, 1000, ALONE)[0]
    assert torch.equal(response_logps(found, batch), response_logps(right, batch))


def left_behind(policy):
    """Bytes in bfloat16 and in a weight's shape that a forward leaves for its backward."""
    shapes = {p.shape for p in policy.model.parameters() if p.dim() > 1}
    shapes |= {torch.Size(reversed(shape)) for shape in shapes}
    found = []

    def noted(tensor):
        if tensor.dtype == torch.bfloat16 and tensor.shape in shapes:
            found.append(tensor.nbytes)
        return tensor

    batch = micro_batches(test_invariance.forest()[:1], policy, 1000, ALONE)[0]
    assert all(batch.ids_BT.numel() not in shape for shape in shapes), "activations would count"
    with torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor):
        value = response_logps(policy, batch).sum()
    value.backward()
    policy.model.zero_grad()
    return sum(found)


def case_copy(folder, members):
    """The frozen copy of split weights is split, and gives the same numbers."""
    for dtype in ("float32", "bfloat16x2"):
        policy = made("llama", "full", dtype=dtype)
        copy = frozen_copy(policy)
        batch = micro_batches(test_invariance.forest(), policy, 1000, ALONE)[0]
        with torch.no_grad():
            expected = response_logps(policy, batch)
        assert torch.equal(live(copy, "").logps(batch), expected)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.mul_(1.1)
        assert torch.equal(live(copy, "").logps(batch), expected)
        assert all(not p.requires_grad for p in copy.model.parameters())


COMMANDS = {
    "train": (preference.TrainConfig, preference.train),
    "sft": (sft.SftConfig, sft.sft),
    "reward": (reward.RewardTrainConfig, reward.train_reward),
    "ppo": (ppo.PpoConfig, ppo.train_ppo),
}


def run(command, folder, name, members, words):
    """A command on a recipe, as the command line runs it; `members` alone: on the main rank, while the others wait."""
    schema, function = COMMANDS[command]
    config = schema.model_validate({**words, "run": str(folder / name)})
    # the others wait elsewhere and take part in nothing that this run decides
    session.current = lambda: members
    if members.is_main or members.size > 1:
        with (folder / f"{name}-{members.rank}.out").open("a") as out, stop_signals("") as stop:
            quiet = Console(file=out)
            function(config, lambda root: Session(RunFolder(root), members, quiet, stop))


def recipe(folder, **more):
    """Few rows, uneven over ranks: 4 prompts in batches of 3."""
    if not (folder / "model").exists():
        tiny.save(folder / "model")
        rows = [{"prompt": f"Film {i % 4}?", "chosen": f"good {i} film", "rejected": f"bad {i}"} for i in range(10)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "length.py").write_text(
            "def score(prompts, responses):\n    return [len(r) / 9 for r in responses]\n"
        )
    return {
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "rows.jsonl")},
        "train": {"batch_prompts": 3, "max_steps": 4, "epochs": 9, "max_tokens_per_pack": 60},
        "optim": {"kind": "rmsprop", "lr": 1e-3, "eps": 1e-3},
    } | more


def both(command, folder, members, name, **more):
    """The same run split and alone; what they wrote must agree."""
    if members.is_main:
        recipe(folder)
    barrier(members)
    words = recipe(folder, **more)
    run(command, folder, f"{name}-split", members, words | {"ranks": {"shard": "full"}})
    if members.is_main:
        run(command, folder, f"{name}-alone", ALONE, words)
        agree(folder / f"{name}-split", folder / f"{name}-alone")
    barrier(members)


def agree(found, expected):
    """Curves to 1e-4 and weights to 2e-5, as test_dist.py asks."""
    from safetensors.torch import load_file

    curves = [
        [r for r in map(json.loads, (one / "metrics.jsonl").read_text().splitlines()) if r["kind"] in ("step", "eval")]
        for one in (found, expected)
    ]
    assert len(curves[0]) == len(curves[1]) >= 4
    for a, b in zip(*curves, strict=True):
        for key in ("loss", "grad_norm", "kl", "reward", "accuracy", "margin", "ended"):
            if b.get(key) is not None:
                close(a[key], b[key], f"{found.name}: {key} at {b['step']}", 1e-4)
    files = [sorted(p.name for p in (one / "model").iterdir()) for one in (found, expected)]
    assert files[0] == files[1], files
    for file in (expected / "model").glob("*.safetensors"):
        mine, theirs = load_file(found / "model" / file.name), load_file(file)
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert float((mine[name] - tensor).abs().max()) < 2e-5, name
    for file in (expected / "model").glob("*.json"):
        assert (found / "model" / file.name).read_text() == file.read_text(), file.name


def case_train(folder, members):
    """A stored reference, held-out figures, a live one for the KL probe, checkpoints."""
    data = {"train": str(folder / "rows.jsonl"), "hold_out": {"share": 0.3}}
    watch = {"kl": {"every": 2, "prompts": 3, "tokens": 5}}
    both("train", folder, members, "train", data=data, watch=watch, save={"every": 2, "keep": 9})


def case_options(folder, members):
    """A reference that follows; a loss in two passes; adapters."""
    follows = {"mode": "live", "sync": {"every": 2, "weight": 0.5}}
    both("train", folder, members, "follows", reference=follows, save={"every": 3})
    terms = {"kind": "sum", "terms": [{"kind": "bco"}, {"kind": "aot"}, {"kind": "kto"}]}
    both("train", folder, members, "passes", loss=terms)
    for name, dora in (("adapters", False), ("dora", True)):
        adapted = {"path": str(folder / "model"), "lora": {"rank": 2, "dora": dora}}
        both("train", folder, members, name, model=adapted, reference={"mode": "live"})


def case_commands(folder, members):
    """SFT, a reward model, PPO with a value head."""
    both("sft", folder, members, "sft")
    both("reward", folder, members, "reward", data={"train": str(folder / "rows.jsonl"), "hold_out": {"share": 0.3}})
    scorer = {"kind": "callable", "path": f"{folder / 'length.py'}:score"}
    settings = {"samples_per_prompt": 3, "updates": 1}
    both("ppo", folder, members, "ppo", reward=scorer, sample={"max_new_tokens": 6}, ppo=settings)


def case_evaluation(folder, members):
    """`favor eval` on the run of `train`: figures and samples of one process, with whole weights and with split ones."""
    results = []
    for ranks, shard in ((ALONE, "none"), (members, "none"), (members, "full")):
        if ranks.size > 1 or members.is_main:
            told = []
            config = EvalConfig.model_validate(
                {
                    "run": str(folder / "train-split"),
                    "data": str(folder / "rows.jsonl"),
                    "ranks": {"shard": shard},
                    "sample": {"max_new_tokens": 7, "batch": 2},
                    "sample_prompts": 3,
                    "samples_per_prompt": 3,
                }
            )
            figures = evaluate(config, lambda said: None, lambda *done, told=told: told.append(done), members=ranks)
            # every response of every kind is told of once, by whichever rank
            for label, total in (("samples", 18), ("answers to read", 12)):
                assert sum(t[1] for t in told if t[0] == label) == total, (label, told)
            if members.is_main:
                samples = (folder / "train-split/samples.jsonl").read_text()
                pairs = [
                    json.loads(line) for line in (folder / "train-split/eval-pairs.jsonl").read_text().splitlines()
                ]
                assert json.loads((folder / "train-split/eval.json").read_text()) == json.loads(json.dumps(figures))
                results.append((figures, samples, pairs))
        barrier(members)
    for figures, samples, pairs in results[1:]:
        right, expected, theirs = results[0]
        assert samples == expected
        assert figures["kl"]["num_samples"] == 9
        for key in ("accuracy", "margin", "loss"):
            close(figures[key], right[key], key, 1e-4)
        for key in ("mean", "se"):
            close(figures["kl"][key], right["kl"][key], f"kl: {key}", 1e-4)
        for a, b in zip(pairs, theirs, strict=True):
            assert a["pair"] == b["pair"]
            close(a["margin"], b["margin"], "margin of a pair", 1e-4)


def case_resumed(folder, members):
    """From the checkpoint after step 2 that other ranks left, on to the end."""
    run("train", folder, "resumed", members, resumable(folder, resume=True))


def case_left(folder, members):
    """What `resumed` begins with; the main rank keeps the final weights aside."""
    if members.is_main:
        recipe(folder)
    barrier(members)
    run("train", folder, "resumed", members, resumable(folder))


def resumable(folder, **more):
    return recipe(
        folder, save={"every": 2, "keep": 9}, optim={"kind": "adamw", "lr": 1e-3}, ranks={"shard": "full"}, **more
    )


def close(found, expected, what, share=1e-5):
    assert abs(found - expected) <= share * max(1, abs(expected)), f"{what}: {found}, not {expected}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    with world() as group:
        for case in sys.argv[2:]:
            globals()[f"case_{case}"](place, group)
            # in one write, or the ranks' lines would mix
            sys.stdout.write(f"done {case} {group.rank}\n")
            sys.stdout.flush()
