"""The page says what the run folder says, escapes what it shows, and is whole on its own."""

import io
import json
import re

import pytest
from favor_frontier.page import SECTIONS, frontier_plot, frontier_rows, widest_kl
from rich.console import Console

from favor.errors import CheckpointError
from favor.report.page import flatten, write_page
from favor.report.records import collect
from favor.report.table import figures_table
from favor.run import RunFolder, append, write_json


def a_run(root, *, steps=12, evil="<script>alert(1)</script>"):
    """A run folder as training and evaluation leave it."""
    root.mkdir()
    folder = RunFolder(root)
    folder.config.write_text('run = "x"\n[loss]\nkind = "dpo"\n')
    append(folder.metrics, {"kind": "event", "step": 0, "name": "self_check", "message": "layout: prompt trees"})
    for step in range(1, steps + 1):
        numbers = {
            "loss": 0.7 - step / 50,
            "accuracy": 0.5 + step / 40,
            "margin": step / 20,
            "reward_chosen": step / 40,
            "reward_rejected": -step / 40,
            "logp_chosen_per_token": -3.0,
            "logp_rejected_per_token": -3.5,
            "chosen_below_reference": 0.2,
            "grad_norm": 2.0,
            "lr": 1e-5,
            "pairs": 8,
            "unique_tokens": 500,
            "tokens_per_s": 180.0,
            "kl": float(step // 4),
        }
        append(folder.metrics, {"kind": "step", "step": step, **numbers})
    append(
        folder.metrics,
        {"kind": "event", "step": 9, "name": "displacement", "message": "warning: 80% of the last pairs"},
    )
    write_json(
        folder.data_report, {"train": {"read": {"num_rows": 7, "dropped": [[3, "chosen is empty"]]}}, "lint": []}
    )
    write_json(
        folder.evaluation,
        {
            "pairs": 100,
            "accuracy": 0.8,
            "accuracy_interval": [0.7, 0.9],
            "reference_accuracy": 0.5,
            "reference_accuracy_interval": [0.4, 0.6],
            "margin": 0.25,
            "margin_interval": [0.2, 0.3],
            "loss": 0.59,
            "kl": {"mean": 1.13, "se": 0.27, "num_samples": 40, "max_new_tokens": 40},
            "score": {
                "name": "sentiment",
                "reference": 0.592,
                "reference_interval": [0.5, 0.6],
                "policy": 0.702,
                "policy_interval": [0.6, 0.8],
                "difference": 0.11,
                "interval": [0.054, 0.166],
                "num_prompts": 20,
                "samples_per_prompt": 4,
            },
        },
    )
    append(
        folder.samples,
        {"prompt": evil, "reference": ["plain"], "policy": [evil], "reference_scores": [0.25], "policy_scores": [0.75]},
    )
    return root


def a_picture(root, evil="<script>alert(1)</script>"):
    """A run folder as frontier, winrate and reward leave it, all in one."""
    a_run(root, steps=6)
    folder = RunFolder(root)

    def value(mean):
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "seeds": [mean, mean]}

    methods = ("start", "dpo", "ppo", "ppo_true", "best_of_n")
    curve = [{"step": s, "kl": s / 2, "reward": 0.5 + s / 20, "seconds": s} for s in (1, 2, 3)]
    write_json(
        folder.frontier,
        {
            "points": {m: [{"strength": s, "kl": value(s), "reward": value(s / 9)} for s in (1, 3)] for m in methods},
            "dominance": [{"a": "dpo", "b": "ppo", "difference": 0.12, "low": 0.01, "high": 0.2, "wins": "dpo"}],
            "stability": [{"method": m, "strength": 3, "seed": 0, "curve": curve} for m in ("dpo", "ppo")],
            "stopped": [{"point": "ppo-3-seed0", "why": f"KL explosion {evil}"}],
            "samples": [
                {"method": "dpo", "strength": s, "samples": [{"prompt": evil, "text": f"dpo at {s}", "reward": 0.875}]}
                for s in (1, 2, 3)
            ],
            "core_seconds": {"dpo": 8.0},
            "finished": 8,
            "wanted": 8,
            "num_prompts": 4,
            "samples_per_prompt": 2,
            "seeds": [0, 1],
        },
    )
    curve = [{"num_pairs": 5, "predicted": p, "observed": p - 0.1} for p in (0.6, 0.9)]
    found = {"pairs": 10, "accuracy": 0.7, "accuracy_interval": [0.6, 0.8], "loss": 0.6, "ece": 0.1, "curve": curve}
    write_json(folder.evaluation, {"calibration": found})
    write_json(
        folder.winrate,
        {
            **{"win_rate": 0.61, "win_rate_interval": [0.5, 0.7], "lc_win_rate": None, "lc_win_rate_interval": None},
            **{
                "wins": 3,
                "ties": 1,
                "losses": 2,
                "pairs": 6,
                "prompts": 6,
                "consistency": 0.9,
                "length_unit": "characters",
            },
            **{"position_bias": 0.02, "position_bias_interval": [-0.1, 0.1], "mean_length_a": 5, "mean_length_b": 6},
            **{"longer_a": 0.4, "invalid": 1, "invalid_verdicts": 1, "left_out": {"only_in_a": 2}},
            **{"a": evil, "b": "sft", "judge": "callable"},
        },
    )
    append(folder.winrate_samples, {"prompt": evil, "a": evil, "b": "plain", "verdict": 0.5})
    return root


def plain(path):
    """The page without what explains its terms."""
    return re.sub(r"</?abbr[^>]*>", "", path.read_text())


def test_frontier_winrate_and_calibration_are_shown_and_escaped(tmp_path):
    write_page(collect(a_picture(tmp_path / "run"), SECTIONS), tmp_path / "page.html")
    page = plain(tmp_path / "page.html")
    for text in (
        "DPO against PPO, learnt reward",
        "+0.120 [+0.010, +0.200]",
        "DPO dominates",
        "target KL 3",
        "3.00 [2.90, 3.10]",
        "0.610 [0.500, 0.700], few: 6 prompts",
        "not available",
        "calibration error (ECE)",
        "0.700 [0.600, 0.800], few: 10 prompts",
        "Brackets are of an earlier favor and too narrow",
        "ppo-3-seed0 stopped early",
        "a tie",
        "without measuring it: DPO 8.",
        'DPO beta 2 <span class="score">0.88</span></h4><p class="text">dpo at 2',
    ):
        assert text in page, text
    assert "dpo at 1" not in page
    assert "<script>alert(1)</script>" not in page
    # the frontier, wide and small; KL and reward of two methods; one calibration curve; seven curves twice, three folded
    assert page.count('<svg class="plot"') == 2 + 4 + 1 + 14 + 3


def test_a_method_that_broke_down_does_not_squash_the_frontier():
    def at(kl):
        return {
            "strength": 1,
            "kl": {"mean": kl, "low": kl - 1, "high": kl + 1},
            "reward": dict.fromkeys(("mean", "low", "high"), 0.5),
        }

    points = {
        "start": [at(0)],
        "dpo": [at(4), at(15)],
        "kto": [at(13)],
        "ppo": [at(6)],
        "unlikelihood": [at(2), at(106)],
    }
    assert widest_kl(points) == 16
    drawn = frontier_plot({"points": points})
    # the line that goes on beyond the axis ends in an arrow, and its last point is not drawn
    assert drawn.count("m-6 -4l7 4l-7 4") == 1
    assert "106" not in re.sub(r"aria-label=\"[^\"]*\"", "", drawn)
    found = {"points": points, "dominance": [], "finished": 7, "wanted": 7, "num_prompts": 4, "samples_per_prompt": 2}
    found |= {"seeds": [0], "stopped": []}
    assert "Unlikelihood alpha 1 (KL 106, reward 0.50)" in frontier_rows(found).notes[-1]
    found["points"] = points | {"unlikelihood": [at(2)]}
    assert not any("Beyond" in note for note in frontier_rows(found).notes)


def test_page_shows_everything_and_escapes_it(tmp_path):
    run = a_run(tmp_path / "run")
    write_page(collect(run), tmp_path / "page.html")
    page = plain(tmp_path / "page.html")
    for text in (
        "Good, 1 warning",
        "Moved the right way on 80 of 100",
        "70 to 90 %; chance is 50 %",
        "0.702 on sentiment",
        "1.13 ± 0.27",
        "+0.110 [+0.054, +0.166]",
        "layout: prompt trees",
        "chosen is empty",
        "0.75",
    ):
        assert text in page
    assert "<script>alert(1)</script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert 'class="warn">warning: 80%' in page
    assert 'src="http' not in page
    assert page.count('<svg class="plot"') == 14 + 3


def test_resumed_steps_count_once(tmp_path):
    run = a_run(tmp_path / "run")
    append(RunFolder(run).metrics, {"kind": "step", "step": 12, "loss": 0.123})
    record = collect(run)
    assert [step["step"] for step in record.steps] == list(range(1, 13))
    assert record.steps[-1]["loss"] == 0.123


def test_a_bare_run(tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.toml").write_text('run = "bare"\n')
    write_page(collect(tmp_path / "bare"), tmp_path / "bare.html")
    assert "No held-out figures" in (tmp_path / "bare.html").read_text()
    with pytest.raises(CheckpointError, match="no run here"):
        collect(tmp_path / "none")
    (tmp_path / "bare/eval.json").write_text("{")
    assert [event["message"] for event in collect(tmp_path / "bare").events] == [
        "warning: eval.json: damaged, left out; run the command that writes it again"
    ]


def test_flatten():
    assert flatten({"a": {"b": 1, "c": [[1, "x"], [2, "y"]]}, "d": []}) == [
        ("a.b", "1"),
        ("a.c", "2: 1 x; 2 y"),
        ("d", "0"),
    ]


def test_few_prompts_are_said_and_no_spread_is_no_interval():
    """On the terminal too, where rich must not take the words for markup."""
    spread = {"accuracy": 1.0, "accuracy_interval": [0.771, 1.0], "pairs": 40, "prompts": 12, "loss": 0.5}
    alike = {
        "reference_accuracy": 0.5,
        "reference_accuracy_interval": [0.2, 0.8],
        "margin": 0.0,
        "margin_interval": None,
    }
    kl = {"mean": 1.0, "se": None, "num_samples": 2, "num_prompts": 1, "max_new_tokens": 8}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(figures_table({**spread, **alike, "kl": kl}))
    text = console.export_text()
    for words in ("1.000 [0.771, 1.000], few: 12 prompts", "+0.000 (no interval: all alike), few: 12 prompts"):
        assert words in text
    assert "1.00 ± unknown, few: 1 prompt " in text
    console.print(figures_table({**spread, **alike, "prompts": 30}))
    assert "few" not in console.export_text()


@pytest.mark.parametrize(
    ("seeds", "prompts", "words"),
    [
        ([0], 64, "say nothing of another seed"),
        ([0, 1, 2], 64, "t with 2 d.o.f. for the seeds. A method"),
        ([0, 1], 12, "few: 12 prompts"),
    ],
)
def test_a_frontier_says_what_its_intervals_are(tmp_path, seeds, prompts, words):
    found = json.loads(RunFolder(a_picture(tmp_path / "run")).frontier.read_text()) | {
        "intervals": "crossed",
        "seeds": seeds,
        "num_prompts": prompts,
    }
    pair = found["dominance"][0]
    found["dominance"] = [
        pair | {"wins": "one seed"},
        pair | {"p": 0.0123, "wins": "neither", "together": (-0.05, 0.29)},
        pair | {"difference": None, "low": None, "high": None, "wins": "neither"},
    ]
    rows = frontier_rows(found)
    assert words in "\n".join(rows.notes)
    # this file is of an earlier favor
    assert "do not correct for that" in "\n".join(rows.notes)
    assert "Holm's correction" in "\n".join(frontier_rows(found | {"correction": "holm"}).notes)
    assert [row[1:] for row in rows.dominance] == [
        ("+0.120 [+0.010, +0.200]", "", "no verdict: one seed"),
        ("+0.120 [+0.010, +0.200], p 0.012", "[-0.050, +0.290]", "neither"),
        ("no KL range in common", "", "neither"),
    ]
