"""The page of a run: verdicts on constructed records, and a file that stands alone whatever text was sampled."""

import json
import math
import re

import numpy as np
import pytest

from grpo_jax.errors import UserError
from grpo_jax.tools.show import page as page_lib
from grpo_jax.tools.show.command import command as main
from grpo_jax.tools.show.command import show
from grpo_jax.tools.show.health import LIGHTS, RULES, health, said
from tests import programs, tiny

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]>&lt;&amp;'\"`",
    "\x00\x01\x1b[31m\r\n\t",
    "$data ${style} $$",
    "\u2028\u2029\ufeff\ufffd\ud800 数学 🙂",
]
HEALTHY = {
    "advantage/differs_from_grpo": 0.9,
    "advantage/success_correlation": 0.8,
    "groups/uninformative": 0.1,
    "policy/clip_fraction_low": 0.01,
    "policy/clip_fraction_high": 0.02,
    "policy/sampler_logp_gap": 1e-5,
    "policy/entropy": 1.0,
    "completion/truncated": 0.0,
    "reward/errors": 0.0,
    "reward/timeouts": 0.0,
    "reward/unscored": 0.0,
    "groups/missing": 0.0,
    "grad/norm": 1.0,
    "time/step_secs": 0.5,
}


def records_of(num_steps=50, **changes):
    """A run in which all is well, but for what `changes` says: a number, or a function of how far the run is (0 to 1)."""
    ramps = {
        "reward/success": lambda t: 0.2 + 0.5 * t,
        "reward/mean": lambda t: 0.2 + 0.5 * t,
        "eval/success": lambda t: 0.2 + t / 2,
    }
    values = {**HEALTHY, **ramps, **{name.replace("__", "/"): value for name, value in changes.items()}}
    parts = [step / max(num_steps - 1, 1) for step in range(num_steps)]
    return [
        {
            "step": step + 1,
            **{name: value(t) if callable(value) else value for name, value in values.items() if value is not None},
        }
        for step, t in enumerate(parts)
    ]


def light_of(title, records, config=None):
    (found,) = [each for each in health(config or tiny.config_of("gtpo"), records) if each.title == title]
    return found.light


# ------------------------------------------------------------------------------------------------------------- health


def test_a_healthy_run_is_fine_throughout():
    checks = health(tiny.config_of("gtpo"), records_of())
    assert {each.light for each in checks} == {"good"} and len(checks) == len(RULES) - 1  # float32 or bfloat16, not both


@pytest.mark.parametrize(
    ("title", "changes", "light"),
    [
        ("The variant is active", {"advantage__differs_from_grpo": 0.0}, "bad"),
        ("The variant is active", {"advantage__differs_from_grpo": 0.2}, "warn"),
        ("The variant is active", {"advantage__differs_from_grpo": 0.2, "groups__uninformative": 0.79}, "good"),
        ("The variant is active", {"advantage__differs_from_grpo": lambda t: float(t < 0.5)}, "bad"),
        ("The variant is active", {"groups__uninformative": 1.0}, "none"),
        ("Credit follows success", {"advantage__success_correlation": -0.3}, "bad"),
        ("Credit follows success", {"advantage__success_correlation": 0.05}, "warn"),
        ("Credit follows success", {"advantage__success_correlation": 0.0}, "none"),
        ("Success is within reach", {"reward__success": 0.0}, "bad"),
        ("Success is within reach", {"reward__success": lambda t: 0.01 * t}, "warn"),
        ("Success rises in training", {"reward__success": 0.4}, "warn"),
        ("Success rises in training", {"reward__success": lambda t: 0.7 - 0.5 * t}, "bad"),
        ("Held-out success rises", {"eval__success": 0.4}, "warn"),
        ("Held-out success rises", {"eval__success": lambda t: 0.7 - 0.5 * t}, "bad"),
        ("Held-out success rises", {"eval__success": None}, "none"),
        ("Groups that say nothing", {"groups__uninformative": 0.6}, "warn"),
        ("Groups that say nothing", {"groups__uninformative": lambda t: t}, "bad"),
        ("Groups missing from batches", {"groups__missing": 0.1}, "warn"),
        ("Groups missing from batches", {"groups__missing": 0.5}, "bad"),
        ("Groups missing from batches", {"groups__missing": None}, "none"),
        ("Clipped below", {"policy__clip_fraction_low": 0.3}, "warn"),
        ("Clipped above", {"policy__clip_fraction_high": 0.6}, "bad"),
        ("Sampler against learner, float32", {"policy__sampler_logp_gap": lambda t: 0.01 * (t == 0)}, "warn"),
        ("Sampler against learner, float32", {"policy__sampler_logp_gap": 1.0}, "bad"),
        ("Entropy left", {"policy__entropy": lambda t: 0.05 + 0.95 * (t < 0.3)}, "warn"),
        ("Entropy left", {"policy__entropy": lambda t: 1.0 * (t < 0.3)}, "bad"),
        ("Cut off by the budget", {"completion__truncated": 0.2}, "warn"),
        ("Cut off by the budget", {"completion__truncated": 0.9}, "bad"),
        ("Scoring errors", {"reward__errors": lambda t: 0.1 * (t == 0)}, "warn"),
        ("Scoring timeouts", {"reward__timeouts": 0.2}, "bad"),
        ("Completions without a score", {"reward__unscored": 0.3}, "warn"),
        ("Completions without a score", {"reward__unscored": 0.6}, "bad"),
        ("Scoring timeouts", {"reward__timeouts": None}, "none"),
        ("Steps with broken numbers", {"grad__norm": lambda t: math.nan if t == 1 else 1.0}, "bad"),
    ],
)
def test_each_verdict(title, changes, light):
    records = records_of(**changes)
    assert light_of(title, records) == light
    (advice,) = [each.sentence for each in health(tiny.config_of("gtpo"), records) if each.title == title]
    (rule,) = [each for each in RULES if each.title == title]
    words = {"good": rule.good, "none": rule.absent}.get(light, rule.advice)
    assert advice == said(words, tiny.config_of("gtpo"))


def test_verdicts_that_depend_on_the_config():
    inactive = records_of(advantage__differs_from_grpo=0.0)
    for variant in ("grpo", "dapo"):
        assert light_of("The variant is active", inactive, tiny.config_of(variant)) == "none"
    bfloat16 = tiny.config_of("gtpo", {"model.dtype": "bfloat16"})
    assert light_of("Sampler against learner, bfloat16", records_of(policy__sampler_logp_gap=0.1), bfloat16) == "good"


def test_the_worst_comes_first_and_a_young_run_has_no_trend():
    records = records_of(num_steps=5, reward__success=0.3, policy__sampler_logp_gap=1.0, groups__uninformative=0.6)
    checks = health(tiny.config_of("gtpo"), records)
    lights = [each.light for each in checks]
    assert lights[:2] == ["bad", "warn"] and lights == sorted(lights, key=LIGHTS.index)
    assert light_of("Success rises in training", records) == light_of("Entropy left", records) == "none"
    assert {each.light for each in health(tiny.config_of("gtpo"), [{"step": 0, "eval/success": 0.3}])} == {"none", "good"}


# --------------------------------------------------------------------------------------------------------------- page


def completions_of(num_steps, num_groups, group_size, num_tokens, pieces, prompt="1 + 1 ="):
    rng = np.random.default_rng(0)
    for step in range(1, num_steps + 1):
        for row in range(num_groups * group_size):
            text = [str(piece) for piece in rng.choice(pieces, num_tokens)]
            yield {
                "step": step,
                "group": row // group_size,
                "prompt": prompt,
                "completion": "".join(text),
                "task_reward": float(row % 2),
                "reward": row % 2 - 0.25,
                "tokens": num_tokens,
                "is_truncated": row % 3 == 0,
                "entropy": 0.51,
                "grpo_advantage": 0.9354,
                "token_text": text,
                "token_entropy": [float(f"{x:.4g}") for x in rng.exponential(1.0, num_tokens)],
                "token_advantage": [float(f"{x:.4g}") for x in rng.normal(size=num_tokens)],
            }


def write_run(workdir, records, completions, variant="gtpo"):
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(tiny.config_of(variant).to_dict()))
    for name, rows in (("metrics", records), ("completions", completions)):
        (workdir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workdir


def embedded_data(html):
    """What a browser would hand to JSON.parse: the element ends at the first `</script`, whatever stands around it."""
    (_, rest) = html.split('<script type="application/json" id="data">')
    return json.loads(re.split("</script", rest, flags=re.IGNORECASE)[0])


def test_a_thousand_completions_of_two_hundred_tokens_fit_in_5_mb(tmp_path):
    words = ["the", " answer", " is", "\n", "<think>", " 42", ",", " because", "ational", " So"]
    rows = list(completions_of(num_steps=25, num_groups=5, group_size=8, num_tokens=200, pieces=words))
    assert len(rows) == 1000
    out = show([write_run(tmp_path / "run", records_of(2000), rows)], None)
    assert 1e6 < out.stat().st_size < 5e6
    (run,) = embedded_data(out.read_text(encoding="utf-8"))
    assert run["numRecorded"] == len(run["steps"]) == 25
    shown = [each for step in run["steps"] for group in step["groups"] for each in group["completions"]]
    for given, got in zip(rows, shown, strict=True):
        assert got["text"] == given["token_text"] and got["isSuccess"] == (given["task_reward"] == 1)
        np.testing.assert_allclose(np.array(got["entropy"]) / run["perUnit"], given["token_entropy"], atol=6e-4)
        np.testing.assert_allclose(np.array(got["advantage"]) / run["perUnit"], given["token_advantage"], atol=6e-4)


def test_more_than_that_leaves_out_steps_evenly(monkeypatch):
    rows = completions_of(num_steps=30, num_groups=2, group_size=2, num_tokens=10, pieces=["x"])
    recorded = page_lib.group_by_step(list(rows))
    assert page_lib.thin_steps(recorded) == recorded
    monkeypatch.setattr(page_lib, "MAX_TOKENS", 400)  # a third of the 1200 there are
    assert [step for step, _ in page_lib.thin_steps(recorded)] == [1, 4, 7, 11, 14, 17, 20, 24, 27, 30]


def test_hostile_text_comes_out_as_it_went_in(tmp_path):
    prompt = "".join(HOSTILE)
    rows = list(completions_of(2, 2, 2, num_tokens=12, pieces=HOSTILE, prompt=prompt))
    rows[0]["token_entropy"][0], rows[0]["token_advantage"][1], rows[0]["reward"] = math.nan, math.inf, -math.inf
    html = page_lib.page([write_run(tmp_path / "run", records_of(grad__norm=math.nan), rows)])
    html.encode("utf-8")
    (run,) = embedded_data(html)
    groups = run["steps"][0]["groups"]
    assert groups[0]["prompt"] == prompt
    assert [each["text"] for group in groups for each in group["completions"]] == [row["token_text"] for row in rows[:4]]
    first = groups[0]["completions"][0]
    assert first["entropy"][0] is None and first["advantage"][1] is None and first["reward"] is None
    assert html.count("alert(1)") > 3 and "<script>alert" not in html and len(re.findall("</script", html)) == 2


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path):
    rows = completions_of(1, 1, 2, 3, ["a"])
    html = page_lib.page([write_run(tmp_path / "run", records_of(), rows)])
    shell = html.replace("http://www.w3.org/2000/svg", "")  # the name of SVG, which nobody fetches
    assert not re.search(r"https?:|//[a-z]+\.|url\(|@import|<link|<img|\bsrc=|fetch\(|XMLHttp|innerHTML", shell)
    assert "default-src 'none'" in html and "prefers-color-scheme: dark" in html
    assert not re.search(r"\$(style|script|data)\b", html)


def test_curves_hold_what_was_recorded(tmp_path):
    records = records_of(3000, eval__success=None)
    records[-1]["eval/success"] = 0.7
    panels = {panel["title"]: panel["series"] for panel in page_lib.panels(records)}
    assert "KL to the reference" not in panels
    training, held_out = panels["Success"]
    assert len(training["steps"]) == page_lib.MAX_POINTS and (training["steps"][0], training["steps"][-1]) == (1, 3000)
    assert training["values"][-1] == 0.7 and held_out == {"name": "held-out, greedy", "steps": (3000,), "values": [0.7]}


def test_a_run_that_goes_on_is_shown_as_far_as_it_is(tmp_path):
    rows = list(completions_of(1, 1, 2, 3, ["é"]))
    workdir = write_run(tmp_path / "run", records_of(), rows)
    for name in ("metrics", "completions"):
        file = workdir / f"{name}.jsonl"
        whole = json.dumps(rows[0], ensure_ascii=False).encode()
        file.write_bytes(file.read_bytes() + whole[: whole.index("é".encode()) + 1])  # cut inside a character
    runs = embedded_data(page_lib.page([workdir, workdir]))
    assert len(runs) == 2 and len(runs[0]["steps"]) == 1
    (workdir / "completions.jsonl").unlink()
    assert embedded_data(page_lib.page([workdir]))[0]["steps"] == []


def test_folders_without_records_are_named(tmp_path):
    with pytest.raises(UserError, match="must be the folder of a training run"):
        show([tmp_path], None)
    with pytest.raises(UserError, match="no records yet"):
        show([write_run(tmp_path / "run", [], [])], None)
    with pytest.raises(UserError, match=r"no token_text, an older version"):
        show([write_run(tmp_path / "old", records_of(), [{"step": 1, "group": 0}])], None)
    with pytest.raises(UserError, match=r"--out=.*cannot be written"):
        show([write_run(tmp_path / "fine", records_of(), [])], tmp_path / "none" / "show.html")


@pytest.mark.slow
def test_the_program_writes_a_page(tmp_path):
    workdir = write_run(tmp_path / "run", records_of(), [])
    status, output = programs.run("experiments.show", str(workdir), f"--out={tmp_path}/page.html")
    assert status == 0, output
    assert embedded_data((tmp_path / "page.html").read_text(encoding="utf-8"))[0]["title"] == "gtpo"


def test_the_program_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys):
    for args in ([], [f"--workdir={tmp_path}/none"]):
        monkeypatch.setattr("sys.argv", ["show", *args])
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr().err
        assert caught.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1


def test_advice_goes_by_what_is_on():
    """DAPO is not told to try dynamic sampling, nor GTPO that it takes GRPO's advantage."""
    silent = [{"step": step, "groups/uninformative": 0.9} for step in range(1, 30)]
    on = tiny.config_of("grpo", {"dynamic_sampling.enabled": True})
    for config, has_advice in ((on, False), (tiny.config_of("grpo"), True)):
        (check,) = [each for each in health(config, silent) if each.title == "Groups that say nothing"]
        assert check.light == "bad" and ("dynamic_sampling" in check.sentence) == has_advice
    for variant, is_grpos in (("gtpo", False), ("dapo", True)):
        (check,) = [each for each in health(tiny.config_of(variant), []) if each.title == "The variant is active"]
        assert check.light == "none" and ("takes GRPO's advantage" in check.sentence) == is_grpos
