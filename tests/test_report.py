"""The report on finished runs: words that claim no more than was shown, and files that say what the runs say."""

import csv
import json
import math
import re

import numpy as np
import pytest

from grpo_jax.analysis import statistics
from grpo_jax.errors import UserError
from grpo_jax.tools.report import document, figures, tables
from grpo_jax.tools.report.analysis import analyse
from grpo_jax.tools.report.command import command as main
from grpo_jax.tools.report.runs import LeftOut, Run, load
from grpo_jax.tools.report.verdict import p_text, verdict
from tests import tiny

METRIC = "eval/success"
GRPO = [0.90, 0.88, 0.91, 0.87, 0.89, 0.92, 0.90, 0.88]
STEPS = 4


def records_of(final, kl=True):
    """Four steps with evaluations before, in the middle and at the end; 100 tokens and half a second a step."""
    training = {"policy/entropy": 0.5, "groups/uninformative": 0.2, "tokens/s": 200.0, "time/step_secs": 0.5}
    training |= {"policy/kl_ref": 0.01} if kl else {}
    evaluated = {0: 0.2, 2: 0.5, STEPS: final}
    return [
        {"step": step, **(training if step else {}), **({METRIC: evaluated[step]} if step in evaluated else {})}
        for step in range(STEPS + 1)
    ]


def runs_of(name, finals, first_seed=0, **config):
    flat = {"num_steps": STEPS, **config}
    return [Run(name, seed, None, flat, records_of(final), {}) for seed, final in enumerate(finals, first_seed)]


def study_of(settings, left_out=(), baseline=None):
    runs = [run for name, finals in settings.items() for run in runs_of(name, finals)]
    return analyse(runs, left_out, METRIC, baseline)


def said_of(name, study):
    (sentence,) = [each for each in verdict(study)[1:] if name in each]
    return sentence


# ---------------------------------------------------------------------------------------------------------------- words


def test_a_clear_difference_is_called_better_or_worse_by_how_much():
    noise = 0.002 * np.array([1, -1, 2, 0, -2, 1, 0, -1])
    study = study_of({"grpo": GRPO, "dapo": np.array(GRPO) + 0.05 + noise, "gtpo": np.array(GRPO) - 0.1 - noise})
    best, dapo, gtpo = verdict(study)
    assert best.startswith("Best: dapo, with a mean of 0.944. The evidence separates it from the second, grpo: 0.050 (95 %")
    assert re.fullmatch(
        r"dapo is better than grpo by 0\.050 \(95 % interval 0\.048 to 0\.052\), p = 0\.016, 8 seeds\.", dapo
    ), "2 / 2^8 twice, for there are two comparisons"
    assert gtpo.startswith("gtpo is worse than grpo by 0.100 (95 % interval 0.098 to 0.102)")


def test_where_nothing_is_shown_the_interval_and_the_seeds_it_would_take_are_said():
    other = np.array(GRPO) + 0.01 * np.array([1, -2, 2, -1, 2, -1, 1, 0])
    study = study_of({"grpo": GRPO, "dapo": other})
    found = study.comparisons[0]
    interval = found.result.difference
    said = said_of("dapo", study)
    assert said.startswith(f"No difference shown between dapo and grpo: +{interval.value:.3f}, p = ")
    assert f"the interval still allows from {interval.low:+.3f} to {interval.high:+.3f}" in said
    assert f"about {statistics.seeds_needed(interval.value / found.result.std)} seeds to show a difference" in said
    assert f"8 seeds find a true difference of {found.detectable:.3f} four times out of five" in said
    assert verdict(study)[0].startswith("No setting is shown to be the best: dapo has the highest mean")


def test_too_few_seeds_are_not_called_no_difference():
    study = study_of({"grpo": GRPO[:5], "dapo": np.array(GRPO[:5]) + 0.05})
    said = said_of("dapo", study)
    assert said.startswith("dapo against grpo is open: 5 seeds cannot show a difference of any size")
    assert "the smallest p that the test can give is 0.062" in said and "At least 6 seeds are needed" in said
    assert "5 seeds cannot separate any two" in verdict(study)[0]

    four = {name: np.array(GRPO[:6]) + gap for name, gap in (("a", 0.1), ("b", 0.2), ("c", 0.3), ("d", 0.4))}
    said = said_of("d against", study_of({"grpo": GRPO[:6], **four}))
    assert "6 seeds cannot show" in said and "corrected for 5 comparisons, is 0.16" in said, "four and the best two"
    assert "At least 8 seeds are needed" in said


def test_one_seed_says_nothing_of_others():
    study = study_of({"grpo": [0.8], "dapo": [0.9]})
    assert said_of("dapo", study) == (
        "dapo against grpo is open: +0.100 on the one seed they share, which says nothing of others."
    )
    assert verdict(study)[0].startswith("No setting is shown to be the best: dapo has the highest mean, 0.900")
    study = study_of({"grpo": GRPO, "dapo": np.array(GRPO) + 0.05, "gtpo": [0.7]})
    assert study.num_tests == 1 and "p = 0.0078, 8 seeds" in said_of("dapo is", study), "no correction for what is no test"


def test_all_that_tie_for_the_highest_are_named():
    study = study_of({"grpo": [0.5] * 8, "dapo": [0.8] * 8, "gtpo": [0.8] * 8, "grpo_s": [0.8] * 8})
    assert verdict(study)[0] == "No setting is shown to be the best: dapo, gtpo and grpo_s share the highest mean, 0.800."


def test_settings_that_differ_in_what_is_evaluated_are_said_first():
    study = study_of({"grpo": GRPO, "dapo": GRPO})
    assert not verdict(study)[0].startswith("Careful")
    for setting, num in zip(study.settings, (64, 128), strict=True):
        for run in setting.runs:
            run.config.update({"eval.num_prompts": num, "task.arithmetic.max_operand": num, "optimizer.b1": num})
    assert verdict(study)[0] == (
        "Careful: the settings differ in what is evaluated (eval.num_prompts, task.arithmetic.max_operand), "
        "so their numbers are of different questions."
    )


@pytest.mark.parametrize(("num_settings", "num_panels"), [(3, 1), (4, 3), (6, 5)])
def test_more_bands_than_can_be_told_apart_get_panels_of_their_own(num_settings, num_panels):
    figure = figures.learning_curves(study_of({f"grpo-{i}": np.array(GRPO) + i / 100 for i in range(num_settings)}))
    assert len([ax for ax in figure.axes if ax.axison]) == num_panels
    assert all(len(ax.get_legend_handles_labels()[1]) == 2 for ax in figure.axes if ax.axison and num_panels > 1)


@pytest.mark.slow
def test_the_pictures_of_a_paper_are_as_wide_as_its_columns(sweep):
    report(sweep)
    for name, inches in {"learning_curves": 3.25, "final": 6.75, "cost": 6.75, "training": 6.75}.items():
        drawn = (sweep / "report" / "paper" / f"{name}.pdf").read_bytes()
        assert drawn.startswith(b"%PDF")
        width = float(re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ", drawn)[1])
        assert width == pytest.approx(72 * inches, abs=0.5), name


def test_settings_all_tied_at_one_are_not_told_apart():
    study = study_of({"grpo": [1.0] * 8, "dapo": [1.0] * 8})
    assert said_of("dapo and", study).startswith("dapo and grpo came out the same on each of 8 seeds")
    assert verdict(study)[0] == "No setting is shown to be the best: grpo and dapo share the highest mean, 1.000."
    assert "1.000 (no spread)" in document.main_table(study)


def test_an_interval_that_leaves_out_0_is_not_enough_by_itself():
    gaps = 0.01 * np.array([3, 2, 4, -1, 3, 2, 0.5, 1])
    others = {name: np.array(GRPO) + 0.001 * np.roll([1, -1, 2, -2, 1, -1, 3, -3], i) for i, name in enumerate("abcd")}
    alone, among = study_of({"grpo": GRPO, "dapo": np.array(GRPO) + gaps}), {"grpo": GRPO, "dapo": np.array(GRPO) + gaps}
    assert said_of("dapo", alone).startswith("dapo is better than grpo by 0.018")
    said = said_of("dapo", study_of(among | others))
    assert said.startswith("No difference shown between dapo and grpo: +0.018")
    assert "leaves out 0, but corrected for 5 comparisons that is not enough" in said


def test_a_small_p_is_not_enough_by_itself():
    gaps = 0.005 * np.array([1, 1, 2, 1, 1, 2, 1, 40])  # all of one sign, and a mean that hangs on one seed
    study = study_of({"grpo": GRPO, "dapo": np.array(GRPO) + gaps})
    assert study.comparisons[0].p == pytest.approx(2 / 2**8)
    said = said_of("dapo", study)
    assert said.startswith(
        "No difference shown between dapo and grpo: +0.031, p = 0.0078; that alone would do, but the interval, -0.0"
    )
    assert "holds 0, and both must agree" in said
    assert "(p = 0.0078, but the interval of their difference, -0.0" in verdict(study)[0]


def test_other_cases_in_words():
    runs = runs_of("grpo", GRPO) + runs_of("dapo", GRPO, first_seed=50)
    study = analyse(runs, [], METRIC, None)
    assert said_of("dapo", study) == "dapo cannot be compared with grpo: they have no seed in common."
    (only,) = verdict(study_of({"dapo": GRPO}))
    assert only == "There is one setting only, dapo: nothing to compare it with."
    runs = runs_of("grpo", GRPO) + runs_of("dapo", [*(np.array(GRPO) - 0.01), *[1.0] * 8])
    study = analyse(runs, [], METRIC, None)
    assert said_of("dapo is", study).startswith("dapo is worse than grpo by 0.010"), "on the seeds that both have"
    assert verdict(study)[0].startswith("No setting is shown to be the best: dapo has the highest mean")
    assert verdict(study)[0].endswith("and dapo is not ahead on the seeds they share).")
    left_out = [LeftOut("dapo", 8, "failed"), LeftOut("dapo", 9, "stopped at step 3 of 4"), LeftOut("gtpo", 1, "waiting")]
    broken = verdict(study_of({"grpo": GRPO, "dapo": GRPO}, left_out))[-1]
    assert "(2 of dapo)" in broken and "flatter" in broken
    assert (p_text(0.0496), p_text(0.0504), p_text(0.0002)) == ("p = 0.05", "p = 0.0504", "p < 0.001")


def test_no_sentence_claims_more_than_the_numbers_whatever_the_seeds_say():
    rng = np.random.default_rng(0)
    claims = 0
    for num in (2, 6, 9):
        for gap in (0, 0.02, 0.05):
            settings = {name: np.clip(rng.normal(0.85 + i * gap, 0.03, num), 0, 1) for i, name in enumerate(("grpo", "a", "b"))}
            study = study_of(settings)
            for comparison, sentence in zip(study.comparisons, verdict(study)[1:], strict=True):
                interval = comparison.result.difference
                is_shown = comparison.p <= 0.05 and interval.low * interval.high > 0
                assert ((" better " in sentence) or (" worse " in sentence)) == is_shown, sentence
                assert (" better " in sentence) <= (interval.value > 0)
                claims += is_shown
    assert claims >= 3


def test_the_best_two_are_compared_also_when_neither_is_the_baseline():
    study = study_of({"grpo": np.array(GRPO) - 0.3, "dapo": GRPO, "gtpo": np.array(GRPO) - 0.1})
    assert [setting.name for setting in study.settings] == ["dapo", "gtpo", "grpo"]
    assert {study.top_two.ours.name, study.top_two.theirs.name} == {"dapo", "gtpo"} and study.num_tests == 3
    assert [each.ours.name for each in study.comparisons] == ["dapo", "gtpo"]
    for comparison in (*study.comparisons, study.top_two):
        assert comparison.p == pytest.approx(3 * statistics.smallest_p(8))
    assert study_of({"grpo": GRPO, "dapo": GRPO}, baseline="dapo").baseline.name == "dapo"
    with pytest.raises(UserError, match="--baseline=ppo: no finished run of it; there are: grpo, dapo"):
        study_of({"grpo": GRPO, "dapo": GRPO}, baseline="ppo")


def test_a_setting_is_summed_up_by_its_seeds_and_their_costs():
    study = study_of({"grpo": [0.9, 0.8]})
    (setting,) = study.settings
    areas = [(2 * 0.35 + 2 * (0.5 + final) / 2) / 4 for final in (0.9, 0.8)]
    np.testing.assert_allclose(setting.area_N, areas)
    assert setting.mean.value == pytest.approx(0.85) and (setting.tokens, setting.secs) == (400, 2)
    assert setting.mean.high == 1.0, "success cannot be above 1"


# --------------------------------------------------------------------------------------------------------------- folders


def write_run(folder, variant, seed, final, kl=True, changes=None, num_records=STEPS + 1):
    folder.mkdir(parents=True)
    config = tiny.config_of(variant, {"num_steps": STEPS, "seed": seed, **(changes or {})}).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    lines = [json.dumps(record) + "\n" for record in records_of(final, kl)[:num_records]]
    (folder / "metrics.jsonl").write_text("".join(lines))
    summary = {"date": "2026-11-22", "commit": "abc1234", "jax": "0.10.2", "devices": "1 x abacus"}
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A reported sweep: six seeds of grpo, dapo and a name that means to do harm; one run of each kind that does not count."""
    workdir = tmp_path_factory.mktemp("sweep")
    rows = []
    for name, variant, gap in (("grpo", "grpo", 0.0), ("dapo", "dapo", 0.05), ("<b>|*x*", "gtpo", -0.01)):
        for seed in range(6):
            folder = f"runs/{variant}-seed{seed}"
            write_run(workdir / folder, variant, seed, GRPO[seed] + gap + 0.001 * seed, kl=variant == "grpo")
            rows.append(dict(name=name, variant=variant, settings={}, seed=seed, folder=folder, status="finished"))
    write_run(workdir / "runs/short", "dapo", 6, 0.9, num_records=3)
    rows.append(dict(name="dapo", variant="dapo", settings={}, seed=6, folder="runs/short", status="finished"))
    rows += [dict(rows[0], seed=7, folder="runs/none", status=status) for status in ("failed", "finished")]
    (workdir / "sweep.json").write_text(json.dumps({"runs": rows}))
    report(workdir)
    return workdir


def report(*args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["report", *map(str, args)])
        main()


@pytest.mark.slow
def test_the_report_of_a_sweep(sweep, capsys):
    out = sweep / "report"
    text = (out / "report.md").read_text()
    for fact in (
        "abc1234",
        "1 x abacus",
        "2026-11-22",
        "jax 0.10.2",
        "6 (0, 1, 2, 3, 4, 5) of every",
        f"`grpo-jax report {sweep}`",
    ):
        assert fact in text
    assert "| objective.kl_coef | 0.0 | 0.04 | 0.0 |" in text and "| seed | 0" not in text
    for reason in ("| dapo | 6 | stopped at step 2 of 4 |", "| grpo | 7 | failed |", "| grpo | 7 | no records in "):
        assert reason in text
    pictures = re.findall(r"!\[[^]]*\]\((.+)\)", text)
    assert sorted(pictures) == sorted(path.name for path in out.glob("*.png")) and len(pictures) == 4
    first = {name: (out / name).read_bytes() for name in ("report.md", "report.html", "results.csv", "runs.csv", *pictures)}
    report(sweep)
    said = [line.removeprefix("- ").replace("\\", "") for line in text.split("\n\n")[1].splitlines()]
    assert capsys.readouterr().out.splitlines() == [*said, f"written: {out}/report.html"]
    assert {name: (out / name).read_bytes() for name in first} == first

    with (out / "results.csv").open() as file:
        rows = {row["setting"]: row for row in csv.DictReader(file)}
    expected = analyse(*load([sweep], METRIC), METRIC, None)
    for setting in expected.settings:
        assert float(rows[setting.name]["mean"]) == pytest.approx(np.mean(setting.final_N))
    assert float(rows["dapo"]["difference"]) == pytest.approx(0.05) and rows["grpo"]["difference"] == ""
    assert len((out / "runs.csv").read_text().splitlines()) == 1 + 18


@pytest.mark.parametrize("draw", [figures.learning_curves, figures.cost, figures.training])
@pytest.mark.parametrize("num_settings", [2, 18])
def test_legends_lie_within_the_picture_and_cover_no_curve(draw, num_settings):
    figure = draw(study_of({f"grpo-entropy_weight={i},stat_scope=batch,and_more": GRPO for i in range(num_settings)}))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert len(legend.get_texts()) == num_settings
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
    assert all(ax.get_tightbbox().y1 <= box.y0 for ax in figure.axes)


def test_unequal_seeds_are_listed_for_each_setting():
    assert document.list_seeds(study_of({"grpo": GRPO[:3], "dapo": GRPO[:2]})) == "grpo: 3 (0, 1, 2); dapo: 2 (0, 1)"


@pytest.mark.slow
def test_the_page_is_one_file_that_needs_nothing_else(sweep):
    html = (sweep / "report/report.html").read_text()
    assert "&lt;b&gt;|*x*" in html and "<b>" not in html and "$" not in html
    links = re.findall(r'(?:src|srcset|href)="([^"]{0,30})', html)
    assert len(links) == 2 * 4 and all(link.startswith("data:image/png;base64,") for link in links)
    light, dark = (set(re.findall(pattern, html)) for pattern in (r' src="([^"]+)"', r'srcset="([^"]+)"'))
    assert len(light) == len(dark) == 4 and not light & dark
    assert html.count('<div class="table"><table>') == html.count("</table></div>") == 4


def test_the_latex_table_is_escaped_and_whole(sweep):
    lines = (sweep / "report/results.tex").read_text().splitlines()
    assert lines[0] == r"\begin{tabular}{lrrrrrr}" and lines[-1] == r"\end{tabular}"
    rows = [line for line in lines if line.endswith(r" \\")]
    assert len(rows) == 4 and all(len(re.findall(r"(?<!\\)&", row)) == 6 for row in rows)
    assert tables.latex_text("dr_grpo 5% -0.1 a-b < {x}") == r"dr\_grpo 5\% $-$0.1 a-b $<$ \{x\}"


def test_tensorboard_finds_the_settings_and_results_of_every_run(sweep):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    folders = sorted((sweep / "report/tensorboard").glob("*-seed*"))
    assert len(folders) == 18
    events = EventAccumulator(str(sweep / "report/tensorboard/dapo-seed2")).Reload()
    assert events.Scalars(f"{METRIC} at the end")[0].value == pytest.approx(GRPO[2] + 0.052)
    (content,) = events.PluginTagToContent("hparams").values()
    found = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["setting"].string_value == "dapo" and found["seed"].number_value == 2
    assert found["objective.clip_high"].number_value == 0.28
    root = EventAccumulator(str(sweep / "report/tensorboard")).Reload().PluginTagToContent("hparams")
    experiment = plugin_data_pb2.HParamsPluginData.FromString(*root.values()).experiment
    assert {"setting", "seed", "objective.kl_coef"} <= {info.name for info in experiment.hparam_infos}


def test_plain_folders_are_grouped_by_their_config(tmp_path):
    folders = [tmp_path / f"{name}-seed{seed}" for name in ("dapo", "grpo") for seed in (0, 1)]
    for folder in folders:
        write_run(folder, folder.name[:4], int(folder.name[-1]), 0.9)
    runs, left_out = load(folders, METRIC)
    assert [(run.name, run.seed) for run in runs] == [("dapo", 0), ("dapo", 1), ("grpo", 0), ("grpo", 1)] and not left_out

    write_run(tmp_path / "other/grpo-seed2", "grpo", 2, 0.9, changes={"optimizer.learning_rate": 0.1})
    with pytest.raises(UserError, match=r"grpo-seed2: called grpo like .*, but optimizer.learning_rate is 0.1, there 0.0006"):
        load([*folders, tmp_path / "other/grpo-seed2"], METRIC)
    write_run(tmp_path / "other/grpo-seed1", "grpo", 1, 0.9)
    with pytest.raises(UserError, match="also called grpo, seed 1"):
        load([*folders, tmp_path / "other/grpo-seed1"], METRIC)


def test_bad_input_is_one_line(tmp_path, capsys):
    write_run(tmp_path / "run", "grpo", 0, 0.9)
    write_run(tmp_path / "short", "grpo", 0, 0.9, num_records=2)
    write_run(tmp_path / "broken", "grpo", 0, math.nan)
    (tmp_path / "file").write_text("")
    cases = {
        (tmp_path,): "neither a sweep's folder (no sweep.json) nor a run's",
        (tmp_path / "run", "--metric=eval/sucess"): "--metric=eval/sucess: not recorded in .*; there are: eval/success",
        (tmp_path / "short",): "no run to report on; short, seed 0: stopped at step 1 of 4",
        (tmp_path / "broken",): "eval/success has no finite value at the last step",
        (tmp_path / "run", f"--out={tmp_path / 'file'}"): "--out=.*file: cannot be written",
        (tmp_path / "run", f"--readme={tmp_path / 'none.md'}"): "--readme=.*none.md: no such file",
        (tmp_path / "run", f"--readme={tmp_path / 'file'}"): "no place for the table; write <!-- report:begin -->",
    }
    for args, expected in cases.items():
        with pytest.raises(SystemExit) as stopped:
            report(*args)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1, args
        assert re.search(expected.replace("(", r"\(").replace(")", r"\)"), said), said


@pytest.mark.slow
def test_the_readme_keeps_all_but_its_table(sweep, tmp_path):
    readme = tmp_path / "README.md"
    said = "The table stands between `<!-- report:begin -->` and `<!-- report:end -->`.\n"
    readme.write_text(f"{said}<!-- report:begin -->\nold\n<!-- report:end -->\nafter\n")
    report(sweep, f"--readme={readme}")
    table = document.main_table(analyse(*load([sweep], METRIC), METRIC, None))
    assert readme.read_text() == f"{said}<!-- report:begin -->\n{table}<!-- report:end -->\nafter\n"
    assert table in (sweep / "report/report.md").read_text() + "\n"
    assert document.insert_table(readme.read_text(), table, "") == readme.read_text()
