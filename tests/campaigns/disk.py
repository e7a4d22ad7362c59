"""Let the disk under a run become full at any moment, make room, and go on: python -m tests.campaigns.disk --num=30 --seed=0

Each case is a small file system of its own (tmpfs, in a namespace of this process: no rights are needed where the system allows
that), with room for another share of what the run writes. Good is one line that says what, where and how much, and a run that
goes on from there to the very results of one that had room from the beginning.
"""

import argparse
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile

from tests.campaigns.common import SmallRun, Tally

ROOM = 64 * 2**20  # bytes in which every run has room
PAGE = 4096


def mount(folder: pathlib.Path, num_bytes: int, *, again: bool = False) -> None:
    """Make a file system of so many bytes, or give one another size."""
    options = f"size={num_bytes}" + ",remount" * again
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def with_limited_files(small: SmallRun, workdir: pathlib.Path, num_bytes: int) -> tuple[str, str]:
    """Go on in a workdir where no file may be longer: what a system without namespaces can do."""
    # Python ignores the signal, so that writing is an ordinary error.
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        return small.try_to_go(workdir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def judge(small: SmallRun, workdir: pathlib.Path, kind: str, said: str) -> tuple[str, str]:
    """Look at what a full disk came to, and go on with room; -> (one of KINDS, what was said)."""
    if kind == "traceback":
        return kind, said
    words = ("free", "cannot be written")
    if kind == "clear line" and not any(word in said for word in words):
        return "silent", f"no word about the disk: {said}"
    again, said_again = small.try_to_go(workdir)
    if again == "traceback" or not small.is_as_expected(workdir):
        return ("traceback" if again == "traceback" else "silent"), f"with room again: {said_again}"
    return kind, said


def campaign(num: int, seed: int, folder: pathlib.Path) -> Tally:
    """Do `num` cases on file systems of their own."""
    chance, tally = random.Random(seed), Tally("disk")
    small = SmallRun(folder / "runs")
    used = sum(path.stat().st_size + PAGE for path in small.whole.rglob("*"))
    place = folder / "small"
    place.mkdir()
    for number in range(num):
        size = max(int(used * chance.uniform(0.05, 1.3)) // PAGE, 1) * PAGE
        mount(place, size)
        try:
            kind, said = small.try_to_go(place / "run")
            mount(place, ROOM, again=True)
            tally.add(*judge_case(small, place / "run", kind, said, f"{number}: {size} bytes"))
        finally:
            subprocess.run(["umount", str(place)], check=True)
    return tally


def judge_case(small, workdir, kind, said, name):
    """-> the arguments of Tally.add."""
    kind, said = judge(small, workdir, kind, said)
    return kind, name, said


def slim(num: int, small: SmallRun) -> Tally:
    """Do a few cases without a file system of their own: no file may be longer than so many bytes."""
    tally = Tally("disk, long files")
    longest = max(path.stat().st_size for path in small.whole.rglob("*") if path.is_file())
    for number in range(num):
        workdir = small.folder / f"full{number}"
        size = longest * number // num
        kind, said = with_limited_files(small, workdir, size)
        tally.add(*judge_case(small, workdir, kind, said, f"files of at most {size} bytes"))
        shutil.rmtree(workdir)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if os.environ.get("GRPO_JAX_IN_NAMESPACE") != "yes":
        os.environ["GRPO_JAX_IN_NAMESPACE"] = "yes"
        rights = ["--map-root-user"] if os.getuid() else []
        os.execvp("unshare", ["unshare", "--mount", *rights, sys.executable, "-m", "tests.campaigns.disk", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as folder:
        tally = campaign(args.num, args.seed, pathlib.Path(folder))
    tally.show()
    raise SystemExit(not tally.is_good)


if __name__ == "__main__":
    main()
