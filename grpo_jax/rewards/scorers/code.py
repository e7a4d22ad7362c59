"""Programs against tests: the last block of code of a completion is run without network, and what it does is compared."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax.rewards.scorers import sandbox
from grpo_jax.rewards.scorers.answers import REASONING_TAGS, judged_text

BLOCK = re.compile(r"^[ \t]*```[ \t]*(\w*)[ \t]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
CHECK_SECS = 30.0  # for an empty program, on a machine that is busy with others
LANGUAGES = ("", "python", "python3", "py")


class UnitTests(NamedTuple):
    """UnitTests of a row. statements: Python that raises if it fails. name, pairs: a function's arguments and what it returns.

    Without a name, pairs are what a program reads and what it prints.
    """

    statements: Sequence[str] = ()
    name: str = ""
    pairs: Sequence[tuple[Any, Any]] = ()

    @property
    def num(self) -> int:
        """The number of them."""
        return len(self.statements) + len(self.pairs)


class Sandbox(NamedTuple):
    """Where programs run and how they count; the fields of config.reward.code."""

    column: str
    partial: bool
    limit_secs: float
    memory_limit_mb: int
    allow_network: bool


def code_score(
    completion: str, item: Mapping[str, Any], *, reasoning_tags: Sequence[str] = REASONING_TAGS, **settings: Any
) -> float | None:
    """Score the last block of code by the tests of its row.

    Args:
      completion: the text. item: the row, its tests in a form of `read_tests`.
      reasoning_tags: what stands between them is no answer. settings: the fields of `Sandbox`.
    Returns: 1.0 if all tests pass, with `partial` their share; None if the row's tests are null.
    Raises: ValueError if the tests have no known form; RuntimeError if the kernel cannot take the network away.
    """
    box = Sandbox(**settings)
    if item[box.column] is None:
        return None
    tests = read_tests(item[box.column])
    text = judged_text(completion, item, reasoning_tags)
    program = None if text is None else last_block(text)
    if program is None:
        return 0.0
    num_passed = run_tests(program, tests, box)
    if box.partial:
        return num_passed / tests.num
    return float(num_passed == tests.num)


def check_sandbox(**settings: Any) -> None:
    """Run a program that does nothing. Raises RuntimeError if this machine cannot run one as the settings want it.

    settings: the fields of `Sandbox`.
    """
    box = Sandbox(**settings)
    if run_tests("", UnitTests(statements=["pass"]), box._replace(limit_secs=CHECK_SECS)) != 1:
        raise RuntimeError(f"a program cannot be run: not even an empty one ends well with {box.memory_limit_mb} MiB")


def last_block(text: str) -> str | None:
    """Return the last block of Python between lines of three backticks."""
    blocks = [code for language, code in BLOCK.findall(text) if language.lower() in LANGUAGES]
    return blocks[-1] if blocks else None


def read_tests(value: Any) -> UnitTests:
    """Read a row's tests: a list of assert statements, one text of them, or what goes in and what comes out.

    "assert f(1) == 2"; ["assert f(1) == 2", ...]; [{"input": "1", "output": "2"}, ...]; {"inputs": [..], "outputs": [..]}, with
    "fn_name" for calls of a function, whose inputs are lists of arguments; or any of these as JSON.

    Raises: ValueError if it is none of them, or there are none.
    """
    if isinstance(value, str):
        if value.lstrip()[:1] not in ("[", "{"):
            return UnitTests(statements=[value])
        value = json.loads(value)
    if isinstance(value, Mapping):
        inputs, outputs = value.get("inputs"), value.get("outputs")
        if inputs and outputs and len(inputs) == len(outputs):
            name = value.get("fn_name") or ""
            if name:
                inputs = [_arguments(each) for each in inputs]
                outputs = [_value(each) for each in outputs]
            return UnitTests(name=name, pairs=list(zip(inputs, outputs, strict=True)))
    elif value and all(isinstance(each, str) for each in value):
        return UnitTests(statements=list(value))
    elif value and all(isinstance(each, Mapping) and {"input", "output"} <= set(each) for each in value):
        return UnitTests(pairs=[(each["input"], each["output"]) for each in value])
    raise ValueError(f"tests of no known form: {value!r:.100}")


def _arguments(value: Any) -> list[Any]:
    """Return a call's arguments: a list of them, or text with one JSON value a line."""
    if isinstance(value, str):
        return [json.loads(line) for line in value.splitlines() if line.strip()]
    return list(value)


def _value(value: Any) -> Any:
    """Return what a call is to return; text may be JSON."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def run_tests(program: str, tests: UnitTests, box: Sandbox) -> int:
    """Run a program against tests.

    Args:
      program: its source. tests: of the row. box: with limits for all of them together; unless `partial` counts, what follows
        a failure is not tried.
    Returns: the number of tests that pass.
    """
    deadline = time.monotonic() + box.limit_secs
    with _folder() as folder:
        (folder / "box" / "program.py").write_text(program, encoding="utf-8", errors="replace")
        if tests.statements:
            secret = secrets.token_hex(16)
            said = _run(folder, "asserts", json.dumps({"statements": tests.statements, "secret": secret}), box, deadline)
            return len({number for key, number in _lines(said) if key == secret and number in range(tests.num)})
        if tests.name:
            job = json.dumps({"name": tests.name, "calls": [args for args, _ in tests.pairs]})
            said = _run(folder, "calls", job, box, deadline)
            returned = {number: value for number, value in _lines(said) if isinstance(number, int)}
            return sum(
                number in returned and is_same(returned[number], expected) for number, (_, expected) in enumerate(tests.pairs)
            )
        num_passed = 0
        for given, expected in tests.pairs:
            printed = _run(folder, "program", str(given), box, deadline)
            is_right = printed is not None and printed.split() == str(expected).split()
            num_passed += is_right
            if time.monotonic() > deadline or not (box.partial or is_right):
                break
        return num_passed


def is_same(found: Any, expected: Any) -> bool:
    """Compare JSON values; floats to nine digits. Some sets of tests put every expected value into a list of one."""
    if isinstance(found, bool) or isinstance(expected, bool):
        is_equal = found is expected
    elif isinstance(found, int | float) and isinstance(expected, int | float):
        is_equal = found == expected or math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-12)
    elif isinstance(found, list) and isinstance(expected, list):
        is_equal = len(found) == len(expected) and all(map(is_same, found, expected))
    else:
        is_equal = found == expected
    if not is_equal and isinstance(expected, list) and len(expected) == 1 and not isinstance(found, list):
        return is_same(found, expected[0])
    return is_equal


@contextmanager
def _folder():
    """Make a folder for one completion: `box`, which the program may write in, and its output beside it."""
    folder = Path(tempfile.mkdtemp(prefix="grpo_jax_code_"))
    (folder / "box").mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(folder: Path, mode: str, stdin: str, box: Sandbox, deadline: float) -> str | None:
    """Run the sandbox once; -> what it wrote, None if it failed or ran out of time (for jobs: as far as it came)."""
    secs = max(deadline - time.monotonic(), 0.01)
    command = [
        sys.executable,
        "-I",
        sandbox.__file__,
        mode,
        str(folder / "box"),
        str(box.memory_limit_mb),
        str(math.ceil(secs)),
    ]
    # Files, not pipes: they are limited in size, and nothing here waits for the one while the other is full.
    (folder / "in").write_text(stdin, encoding="utf-8", errors="replace")
    with open(folder / "in", "rb") as given, open(folder / "out", "wb") as out:
        process = subprocess.Popen(
            [*command, str(int(box.allow_network))],
            stdin=given,
            stdout=out,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={"PATH": os.environ.get("PATH", ""), "LANG": "C.UTF-8", "HOME": str(folder / "box")},
        )
        try:
            status = process.wait(secs)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _kill_group(process)
    if status == sandbox.UNCONFINED and not box.allow_network:
        raise RuntimeError(
            "this kernel allows no process without network (unshare); config.reward.code.allow_network = True runs them with it"
        )
    if mode == "program" and status != 0:
        return None
    with open(folder / "out", "rb") as out:
        return out.read(sandbox.MAX_FILE_BYTES).decode("utf-8", "replace")


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its group; those of its namespaces end with it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _lines(text: str | None) -> list[tuple[Any, Any]]:
    """Read the pairs that a job wrote; what is none of them is left out."""
    pairs = []
    for line in (text or "").splitlines():
        try:
            key, value = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            continue
        pairs.append((key, value))
    return pairs
