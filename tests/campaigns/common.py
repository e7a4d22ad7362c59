"""Common to the campaigns: the small run that things are done to, what came of it, and the table of all cases."""

import contextlib
import dataclasses
import io
import json
import pathlib
import shutil
import traceback

import jax
import numpy as np
from absl import logging
from rich.console import Console
from rich.table import Table

from grpo_jax import files
from grpo_jax.errors import UserError
from grpo_jax.tools import cli
from grpo_jax.training import trainer
from grpo_jax.training.checkpoint import saved_steps
from grpo_jax.training.records import cut_after
from grpo_jax.training.run import make_run
from grpo_jax.training.runlog import completion_fault, metrics_fault
from tests import programs, tiny

logging.set_verbosity(logging.FATAL)  # as the programs do
KINDS = ("harmless", "clear line", "traceback", "silent")
SMALL = {
    "num_steps": 4,
    "eval_every": 2,
    "eval.num_prompts": 4,
    "eval.num_samples": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 3,
    "log.completions_every": 1,
    "optimizer.warmup_steps": 0,
    "dynamic_sampling.enabled": False,
}


@dataclasses.dataclass
class Tally:
    """Cases of a campaign by what came of them."""

    title: str
    cases: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)

    def add(self, kind: str, case: str, said: str = "") -> None:
        """Count a case. kind: one of KINDS. said: the line, or the last one of a traceback."""
        assert kind in KINDS
        self.cases.append((kind, case, said))

    def count(self, kind: str) -> int:
        return sum(each == kind for each, _, _ in self.cases)

    @property
    def is_good(self) -> bool:
        """Nothing ended in a traceback, and nothing wrong went by in silence."""
        return bool(self.cases) and not self.count("traceback") and not self.count("silent")

    def show(self) -> None:
        """Print the bad cases, and the table."""
        for kind, case, said in self.cases:
            if kind in ("traceback", "silent"):
                print(f"{kind}: {case}: {files.printable(said, 400)}")
        table = Table("campaign", "cases", *KINDS)
        table.add_row(self.title, str(len(self.cases)), *(str(self.count(kind)) for kind in KINDS))
        Console().print(table)


class SmallRun:
    """A run of a few steps, compiled once, with the files and the weights of one that nobody disturbed."""

    def __init__(self, folder: pathlib.Path, num_steps: int = 4, **changes):
        self.folder = folder
        self.run = make_run(tiny.config_of("dapo", {**SMALL, "num_steps": num_steps, **changes}))
        self.whole = folder / "whole"
        self.go(self.whole)
        self.expected = self.results(self.whole)

    def go(self, workdir: pathlib.Path) -> None:
        """Train in a workdir."""
        files._said.clear()
        trainer.train_run(self.run, workdir)

    def stopped_before_the_end(self) -> pathlib.Path:
        """-> a folder as a SIGTERM before the last step leaves it, with two checkpoints."""
        begun = copy_of(self.whole, self.folder / "begun")
        (begun / "summary.json").unlink()
        *_, before, last = saved_steps(begun)
        shutil.rmtree(begun / "checkpoints" / str(last))
        for name, check in (("metrics.jsonl", metrics_fault), ("completions.jsonl", completion_fault)):
            cut_after(begun / name, before, check)
        return begun

    def results(self, workdir: pathlib.Path):
        """Everything that a run is for: records, completions, and the last weights."""
        step = saved_steps(workdir)[-1]
        params = jax.tree.map(np.asarray, self.run.restore_policy(workdir, step))
        lines = [json.loads(line) for line in (workdir / "completions.jsonl").read_text().splitlines()]
        return step, programs.records(workdir), lines, jax.tree.leaves(params)

    def is_as_expected(self, workdir: pathlib.Path) -> bool:
        """Bitwise."""
        try:
            step, records, lines, params = self.results(workdir)
        except ValueError:  # a damaged line that is kept
            return False
        same = step, records, lines
        weights = zip(params, self.expected[3], strict=True)
        return same == self.expected[:3] and all(np.array_equal(x, y) for x, y in weights)

    def try_to_go(self, workdir: pathlib.Path) -> tuple[str, str]:
        """Go on in a workdir; -> (what came of it, one of KINDS but without a look at the results; what was said)."""
        kind, said = "harmless", io.StringIO()
        cli.shorten_background_faults()  # as the programs do
        with contextlib.redirect_stderr(said):
            try:
                self.go(workdir)
            except UserError as error:
                kind = "clear line"
                said.write(f"error: {error}")
            except Exception:
                return "traceback", traceback.format_exc().strip().splitlines()[-1]
        text = said.getvalue()
        if "Traceback" in text:  # of a thread in the background
            return "traceback", text.strip().splitlines()[-1]
        return ("clear line" if "note:" in text else kind), text


def write_host_data(folder: pathlib.Path) -> dict[str, object]:
    """Write a tiny random model and questions; -> the settings of a run whose rewards come from worker processes."""
    from tests.hf_models import torch_model
    from tests.test_tasks_host import save_hf_tokenizer

    save_hf_tokenizer(folder / "model", {}, eos_token="<eos>", pad_token="<pad>")
    torch_model("llama tied", vocab_size=259, num_hidden_layers=1).save_pretrained(folder / "model")
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(9) for b in range(9)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model.path": str(folder / "model"),
        "task.name": "jsonl",
        "task.jsonl.path": str(folder / "sums.jsonl"),
        "task.use_chat_template": False,
        "warm_start.num_steps": 0,
        "eval.num_prompts": 8,
    }


def copy_of(folder: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
    """Copy a folder over whatever is there."""
    shutil.rmtree(to, ignore_errors=True)
    return pathlib.Path(shutil.copytree(folder, to))
