"""Train with rewards that fork, daemonise, scribble, kill and fill: python -m tests.campaigns.rewards --num=100 --seed=0

Each case is a whole run with one function of tests/campaigns/hostile.py, which does its act on one completion in four. Good is
a run that comes to its end, with the right score for every other completion, and that leaves no process, no temporary file
and no open descriptor behind. --only_scores leaves the training out, and scores batches of texts.
"""

import argparse
import contextlib
import io
import os
import pathlib
import random
import shutil
import tempfile
import traceback

import numpy as np

from grpo_jax import files
from grpo_jax.config import RewardConfig, ScoringConfig
from grpo_jax.errors import UserError
from grpo_jax.rewards.reward_function import RewardFunction
from grpo_jax.training import trainer
from grpo_jax.training.run import make_run
from grpo_jax.training.runlog import read_completions
from tests import tiny
from tests.campaigns import hostile
from tests.campaigns.common import SMALL, Tally, write_host_data
from tests.campaigns.hostile import EITHER, EXPECTED, NONE, RIGHT, good, is_hostile

MARK = "GRPO_JAX_CAMPAIGN"  # in the environment of all that a case starts
REWARD = "tests.campaigns.hostile:does"
COLUMNS = {"prompt", "answer"}


def make_reward(chance: random.Random) -> RewardFunction:
    """A hostile part, and a harmless one beside it in the same processes."""
    scoring = ScoringConfig(num_workers=chance.choice((1, 2, 3)), time_limit_secs=2.0, memory_limit_mb=1024, file_limit_mb=8)
    config = RewardConfig(task=REWARD, shaping="0*exact", scoring=scoring)
    return RewardFunction(config, "jsonl", 10, COLUMNS)


def wrong_score(name: str, completion: str, score: float | None) -> str:
    """Say what is wrong with a completion's score, None if it has none; "" if nothing is."""
    is_right = score == good(completion)
    if is_hostile(completion):
        is_fine = {RIGHT: is_right, NONE: score is None, EITHER: is_right or score is None}[EXPECTED[name]]
        return "" if is_fine else f"a hostile completion, of which {EXPECTED[name]} is expected, has {score}"
    return "" if is_right else f"{completion!r} has {score} in place of {good(completion)}"


def score_texts(name: str, chance: random.Random) -> str:
    """Score two batches; -> what is wrong, or ""."""
    function = make_reward(chance)
    try:
        for _ in range(2):
            texts_PG = [[f"text {chance.randrange(10**6)}" for _ in range(4)] for _ in range(8)]
            items = [{"prompt": "1+1=", "answer": "2"} for _ in texts_PG]
            reward = function(items, texts_PG, np.ones((8, 4)))
            rows = zip(np.ravel(texts_PG), np.ravel(reward.task_PG), np.ravel(np.asarray(reward.is_scored_PG)), strict=True)
            for text, score, is_scored in rows:
                fault = wrong_score(name, str(text), float(score) if is_scored else None)
                if fault:
                    return fault
    finally:
        function.close()
    return ""


def make_small_run(folder: pathlib.Path):
    """The run that all cases train, compiled once: a small fresh model, whose completions are noise."""
    changes = {"reward.task": REWARD, "reward.shaping": "0*exact", "num_steps": 2, "log.num_groups": 4}
    return make_run(tiny.config_of("grpo", SMALL | write_host_data(folder) | changes))


def train(run, name: str, chance: random.Random, workdir: pathlib.Path) -> str:
    """Train with a hostile reward; -> what is wrong, or ""."""
    function = make_reward(chance)
    run.task._reward_function.close()
    run.task._reward_function = function
    try:
        trainer.train_run(run, workdir)
    finally:
        function.close()
    rows = read_completions(workdir)
    assert rows and (workdir / "summary.json").exists()
    for row in rows:
        score = row["task_reward"] if row.get("is_scored", True) else None
        fault = wrong_score(name, row["completion"], score)
        if fault:
            return fault
    return ""


def left_behind(case: str, temporary: pathlib.Path, before: set[str]) -> str:
    """Say what is still there of a case; "" if nothing is."""
    processes = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_own = int(folder.name) == os.getpid()
            is_marked = f"{MARK}={case}".encode() in (folder / "environ").read_bytes().split(b"\0")
            is_asleep = (folder / "cmdline").read_bytes().split(b"\0")[:2] == [x.encode() for x in hostile.SLEEP]
            is_zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if not is_own and not is_zombie and (is_marked or is_asleep):
                processes.append(folder.name)
    there = sorted(path.name for path in temporary.iterdir()) + sorted(set(os.listdir()) - before)
    if not processes and not there:
        return ""
    return f"left behind: processes {processes}, files {there[:5]}"


@contextlib.contextmanager
def unheard():
    """Send what this process and those that it starts write on stderr to nowhere: rewards write anything there."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def campaign(num: int, seed: int, folder: pathlib.Path, *, only_scores: bool = False) -> Tally:
    """Do `num` cases, every act once before any comes again."""
    chance, tally = random.Random(seed), Tally("rewards, scores" if only_scores else "rewards")
    run = None if only_scores else make_small_run(folder)
    names = sorted(EXPECTED)
    order = [name for _ in range(num // len(names) + 1) for name in chance.sample(names, len(names))][:num]
    temporary = folder / "tmp" / "tmp"
    for number, name in enumerate(order):
        case = f"{os.getpid()}-{number}"
        temporary.mkdir(parents=True)
        before, descriptors = set(os.listdir()), len(os.listdir("/proc/self/fd"))
        old, tempfile.tempdir = tempfile.tempdir, str(temporary)
        os.environ |= {MARK: case, hostile.ACT: name}
        files._said.clear()
        try:
            with unheard():
                fault = score_texts(name, chance) if run is None else train(run, name, chance, folder / str(number))
            kind, said = ("silent" if fault else "harmless"), fault
        except UserError as error:
            kind, said = "clear line", str(error)
        except Exception:
            kind, said = "traceback", traceback.format_exc().strip().splitlines()[-1]
        finally:
            tempfile.tempdir = old
            del os.environ[MARK], os.environ[hostile.ACT]
        left = left_behind(case, temporary, before)
        if (folder / "tmp" / "pwned").exists():
            left = "a pickle was executed"
        if not left and len(os.listdir("/proc/self/fd")) > descriptors + 2:
            left = f"{len(os.listdir('/proc/self/fd'))} open descriptors, {descriptors} before"
        tally.add("silent" if left and kind != "traceback" else kind, name, " ".join(filter(None, (said, left))))
        shutil.rmtree(folder / "tmp")
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=len(EXPECTED))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only_scores", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = campaign(args.num, args.seed, pathlib.Path(folder), only_scores=args.only_scores)
    tally.show()
    raise SystemExit(not tally.is_good or tally.count("clear line") > 0)


if __name__ == "__main__":
    main()
