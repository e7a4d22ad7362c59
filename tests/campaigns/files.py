"""Damage every file of a run's folder, go on, and look at what came of it: python -m tests.campaigns.files --num=300 --seed=0

Each case is one file, deleted, emptied, cut in half or with one bit flipped; then the readers of a folder read it, and the run
goes on by one step. Good is what is bitwise as if nothing had happened, or a line that names what is wrong.
"""

import argparse
import contextlib
import io
import pathlib
import random
import tempfile
import traceback

from grpo_jax.errors import UserError
from grpo_jax.tools.report.runs import load
from grpo_jax.tools.show.page import page
from grpo_jax.training.checkpoint import saved_steps
from tests.campaigns.common import SmallRun, Tally, copy_of, files

# What is drawn for people, and read by none of our programs.
PICTURES = ("learning_curve.png", "tensorboard")


def delete(path, chance):
    path.unlink()


def empty(path, chance):
    path.write_bytes(b"")


def halve(path, chance):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bit(path, chance):
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def blank_line(path, chance):
    lines = path.read_bytes().splitlines(keepends=True)
    lines.insert(chance.randrange(len(lines) + 1), b"\n")
    path.write_bytes(b"".join(lines))


DAMAGES = {"deleted": delete, "emptied": empty, "halved": halve, "bit": flip_bit}


def all_cases(begun: pathlib.Path):
    """-> (file, damage) of everything in a folder."""
    names = sorted(str(path.relative_to(begun)) for path in begun.rglob("*") if path.is_file())
    names = [name for name in names if not name.startswith(PICTURES)]
    cases = [(name, damage) for name in names for damage in DAMAGES.values()]
    return cases + [(name, blank_line) for name in names if name.endswith(".jsonl")]


def read_all(workdir) -> tuple[str, str]:
    """Let the readers of a folder read it; -> (what came of it, what was said)."""
    said = io.StringIO()
    for reader in (lambda: page([workdir]), lambda: load([workdir], "eval/success")):
        try:
            with contextlib.redirect_stderr(said):
                reader()
        except UserError as error:
            said.write(f"note: {error}\n")
        except Exception:
            return "traceback", traceback.format_exc().strip().splitlines()[-1]
    return ("clear line" if "note:" in said.getvalue() else "harmless"), said.getvalue()


def judge(small: SmallRun, workdir: pathlib.Path) -> tuple[str, str]:
    """Go on with a damaged run, and read it; -> (what came of it, what was said)."""
    files._said.clear()
    kind, said = read_all(workdir)
    if kind == "traceback":
        return kind, said
    kind, said_by_run = small.try_to_go(workdir)
    said += said_by_run
    if kind == "traceback":
        return kind, said_by_run
    if saved_steps(workdir)[-1:] != [small.run.config.num_steps]:
        # There is a whole checkpoint in each case, so every run can go on.
        return "silent", f"it did not go on: {said_by_run}"
    if small.is_as_expected(workdir):
        return kind, said
    return ("clear line" if "note:" in said else "silent"), said or "the results are others, and nothing was said"


def campaign(num: int, seed: int, small: SmallRun) -> Tally:
    """Do `num` cases."""
    chance, tally = random.Random(seed), Tally("files")
    begun = small.stopped_before_the_end()
    cases = all_cases(begun)
    # Every case once, in an order of chance, before any comes again: a flipped bit is another one each time.
    order = [case for _ in range(num // len(cases) + 1) for case in chance.sample(cases, len(cases))][:num]
    for number, (name, damage) in enumerate(order):
        workdir = copy_of(begun, small.folder / f"case{number}")
        damage(workdir / name, chance)
        kind, said = judge(small, workdir)
        tally.add(kind, f"{name} {damage.__name__}", said)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = campaign(args.num, args.seed, SmallRun(pathlib.Path(folder)))
    tally.show()
    raise SystemExit(not tally.is_good)


if __name__ == "__main__":
    main()
