"""The front door for Python: ten lines train with rows, functions and callbacks, and resume like any other run."""

import json
import os
import re
import subprocess
import sys
import textwrap

import pytest

import grpo_jax
from grpo_jax.errors import UserError
from grpo_jax.training.brought import Brought
from tests import programs
from tests.hf_models import torch_model
from tests.test_tasks_host import save_hf_tokenizer

SCRIPT = """
import sys
import grpo_jax

class Killer:
    def on_save(self, step):
        if sys.argv[2:] == ["kill"]:
            raise SystemExit(3)

def brevity(completion, item, scale=1.0):
    return scale * (item["answer"] in completion) - len(completion) / 100

rows = [{"prompt": f"{i} + 1 =", "answer": i + 1} for i in range(24)]
if __name__ == "__main__":
    run = grpo_jax.train(
        "gtpo", workdir=sys.argv[1], model="model", data=rows, reward=brevity, callbacks=[Killer()], settings=SETTINGS
    )
    print(run.summary["steps"], len(run.metrics), len(run.completions) > 0)
"""
SETTINGS = {
    "num_steps": 4,
    "eval_every": 0,
    "checkpoint.every": 2,
    "task.use_chat_template": False,
    "rollout.num_prompts": 4,
    "rollout.group_size": 4,
    "rollout.max_completion_tokens": 4,
    "eval.num_prompts": 4,
    "eval.num_samples": 0,
    "log.completions_every": 2,
    "mesh.data": 1,
    "objective.success_threshold": -0.03,
    "reward.scoring.time_limit_secs": 60.0,
    "reward.params": {"scale": 2.0},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny model and a script that trains it."""
    folder = tmp_path_factory.mktemp("home")
    save_hf_tokenizer(folder / "model", {}, eos_token="<eos>", pad_token="<pad>")
    torch_model("llama tied", vocab_size=259, num_hidden_layers=1).save_pretrained(folder / "model")
    (folder / "script.py").write_text(SCRIPT.replace("SETTINGS", repr(SETTINGS)))
    return folder


def run(home, workdir, *args):
    env = os.environ | programs.environment(cache=home / "compiled") | {"PYTHONPATH": str(programs.ROOT)}
    command = [sys.executable, "script.py", workdir, *args]
    return subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_script_trains_with_rows_a_function_and_a_callback_and_resumes_bitwise(home):
    done = run(home, "whole")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "5", "True"]
    assert re.search(r"brought_\w+:brevity is called for one completion: completion, item, scale", done.stderr)
    assert run(home, "cut", "kill").returncode == 3
    changed = (home / "script.py").read_text().replace("/ 100", "/ 99")
    (home / "script.py").write_text(changed.replace("range(24)", "range(25)"))
    resumed = run(home, "cut")
    assert resumed.returncode == 0, resumed.stderr
    assert "cut: goes on with other data, brevity than it began with" in resumed.stderr
    (home / "script.py").write_text(SCRIPT.replace("SETTINGS", repr(SETTINGS)))
    assert run(home, "again", "kill").returncode == 3
    assert run(home, "again").returncode == 0
    whole, again = (programs.records(home / name) for name in ("whole", "again"))
    assert whole == again and len(whole) == 5
    # A run like any other: the command line evaluates it, its functions and data with it.
    status, output = programs.run("grpo_jax", "evaluate", f"--workdir={home}/whole", cache=home / "compiled")
    assert status == 0, output
    assert json.loads((home / "whole" / "evaluation.json").read_text())["step"] == 4


def double(completion, item):
    return 2.0


def test_rewards_become_an_expression(tmp_path):
    brought = Brought(tmp_path)
    assert brought.expression_of("0.5*math_verify - length", "reward") == "0.5*math_verify - length"
    assert brought.expression_of(double, "reward") == "+ 1.0*tests.test_python:double".removeprefix("+ ")
    assert (
        brought.expression_of({"math_verify": 1, double: -0.25}, "reward") == "1.0*math_verify - 0.25*tests.test_python:double"
    )
    local = brought.expression_of(["exact", lambda completion, item: 1.0], "reward")
    assert re.fullmatch(r"1\.0\*exact \+ 1\.0\*brought_\w{8}:function_1", local)
    with pytest.raises(UserError, match=r"shaping: 3 is neither a function nor the name of a part"):
        brought.expression_of([3], "shaping")


def test_rows_that_do_not_fit_are_named(tmp_path):
    brought = Brought(tmp_path)
    with pytest.raises(UserError, match=r"data\[1\]: expected a row with columns, .* got 'two'"):
        brought.path_of([{"prompt": "1"}, "two"], "data")
    with pytest.raises(UserError, match=r"data\[0\]: Object of type bytes is not JSON serializable; rows are kept as JSON"):
        brought.path_of([{"prompt": b"1"}], "data")
    with pytest.raises(UserError, match=r"data: expected a path, a list of rows or a dataset, got dict"):
        brought.path_of({"prompt": "1"}, "data")
    assert not (tmp_path / "brought").exists(), "nothing is written before all is read"


def test_bad_arguments_name_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"variant: no config 'ppo' is shipped; .* one of grpo, dapo"):
        grpo_jax.train("ppo", workdir=tmp_path / "run")
    with pytest.raises(UserError, match=r"settings: 'rollout.group' is no field"):
        grpo_jax.train("grpo", workdir=tmp_path / "run", settings={"rollout.group": 8})
    with pytest.raises(UserError, match=r"eval_data: held-out questions of which data\? give data too"):
        grpo_jax.train("grpo", workdir=tmp_path / "run", eval_data="x.jsonl")
    assert not (tmp_path / "run").exists()
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = grpo_jax.trian
    assert {"train", "sweep", "report", "show"} <= set(dir(grpo_jax))


@pytest.mark.slow
def test_a_sweep_a_report_and_a_page(tmp_path):
    """In a process of its own, since a sweep starts processes that import the script again."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import grpo_jax
            small = {"warm_start.num_steps": 2, "num_steps": 2, "eval.num_samples": 0}
            if __name__ == "__main__":
                swept = grpo_jax.sweep(["grpo", "gspo"], workdir="sweep", seeds=(0, 1), scale="runlocal", settings=small)
                assert set(swept.status.values()) == {"finished"} and not swept.errors, swept
                report = swept.report()
                assert report.verdict and "gspo" in report.table and report.pictures and "<table>" in report._repr_html_()
                page = grpo_jax.show("sweep/runs/grpo-seed0")
                assert page.path.exists() and "iframe" in page._repr_html_()
            """
        )
    )
    env = os.environ | programs.environment(cache=tmp_path / "compiled") | {"PYTHONPATH": str(programs.ROOT)}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
