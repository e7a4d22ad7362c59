"""Rewards that do on one completion in four what no reward should; to all others they give their score.

The reward is tests.campaigns.hostile:does, and the environment says which act it does: GRPO_JAX_ACT=forks. EXPECTED says what
a hostile completion itself may come to.
"""

import atexit
import contextlib
import ctypes
import functools
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib

ACT = "GRPO_JAX_ACT"
SLEEP = ["sleep", "3141"]  # what is left behind is known by its command line
RIGHT, NONE, EITHER = "the right score", "no score", "either"
EXPECTED: dict[str, str] = {}


def good(completion: str) -> float:
    """The right score."""
    return float(zlib.crc32(completion.encode()) >> 8 & 1)


def right(completion, item):
    """A reward that does nothing but its work."""
    return good(completion)


CHOSEN = os.environ.get(ACT, "right")  # read once, for an act may clear the environment


def does(completion, item):
    """The reward of the act that the environment names."""
    return globals()[CHOSEN](completion, item)


def is_hostile(completion: str) -> bool:
    return zlib.crc32(completion.encode()) % 4 == 0


def hostile(expected: str):
    """Make a reward of what is done to a completion. expected: what it may come to. An act may return a score of its own."""

    def decorate(act):
        EXPECTED[act.__name__] = expected

        @functools.wraps(act)
        def reward(completion, item):
            score = good(completion)
            if is_hostile(completion):
                own = act(completion, item)
                return score if own is None else own
            return score

        return reward

    return decorate


def pipes():
    """Descriptors of this process that are pipes, and those of its keeper."""
    for folder in ("/proc/self/fd", f"/proc/{os.getppid()}/fd"):
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                with contextlib.suppress(OSError):
                    if os.readlink(f"{folder}/{name}").startswith(("pipe:", "socket:")):
                        yield int(name)


def daemonise():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.execvp(SLEEP[0], SLEEP)
        os._exit(0)


# --- processes


@hostile(RIGHT)
def forks(completion, item):
    os.fork()


@hostile(RIGHT)
def forks_in_c(completion, item):
    ctypes.CDLL(None).fork()


@hostile(RIGHT)
def forks_eight_times(completion, item):
    for _ in range(3):
        os.fork()


@hostile(RIGHT)
def daemonises(completion, item):
    daemonise()


@hostile(NONE)
def daemonises_and_exits(completion, item):
    daemonise()
    os._exit(3)


@hostile(RIGHT)
def starts_a_program_without_a_mark(completion, item):
    subprocess.Popen(SLEEP, env={"PATH": os.environ["PATH"]}, start_new_session=True)


@hostile(EITHER)
def kills_its_parent(completion, item):
    os.kill(os.getppid(), signal.SIGKILL)


@hostile(EITHER)
def stops_its_parent(completion, item):
    daemonise()
    os.kill(os.getppid(), signal.SIGSTOP)


@hostile(NONE)
def kills_its_group(completion, item):
    daemonise()
    os.killpg(0, signal.SIGKILL)


@hostile(NONE)
def kills_itself(completion, item):
    os.kill(os.getpid(), signal.SIGKILL)


@hostile(NONE)
def terminates_itself(completion, item):
    os.kill(os.getpid(), signal.SIGTERM)


@hostile(NONE)
def stops_itself(completion, item):
    os.kill(os.getpid(), signal.SIGSTOP)


@hostile(NONE)
def crashes(completion, item):
    ctypes.string_at(0)


@hostile(NONE)
def exits(completion, item):
    sys.exit(0)


@hostile(RIGHT)
def sleeps_at_exit(completion, item):
    atexit.register(time.sleep, 1000)


@hostile(EITHER)
def ends_later(completion, item):
    threading.Timer(0.05, os._exit, [1]).start()


@hostile(EITHER)
def sets_an_alarm(completion, item):
    signal.setitimer(signal.ITIMER_REAL, 0.05)


@hostile(EITHER)  # their stacks may reach the limit of memory
def leaves_threads(completion, item):
    for _ in range(20):
        threading.Thread(target=time.sleep, args=(1000,)).start()


# --- time and memory


@hostile(NONE)
def hangs(completion, item):
    time.sleep(1000)


@hostile(NONE)
def hangs_deaf_with_a_daemon(completion, item):
    daemonise()
    for number in range(1, 64):
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(1)


@hostile(NONE)
def allocates(completion, item):
    return float(len(bytearray(10 * 2**30)))


@hostile(NONE)
def recurses(completion, item):
    return recurses(completion, item)


@hostile(NONE)
def takes_its_time_limit(completion, item):
    resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
    while True:
        pass


# --- descriptors


class Evil:
    def __reduce__(self):
        return (os.system, (f"touch {tempfile.gettempdir()}/../pwned",))


def scribble(numbers):
    body = pickle.dumps(Evil())
    for text in (b"garbage" * 9, struct.pack("<Q", len(body)) + body, b"\xffGJ1" + struct.pack("<QIIf", 5, 1, 0, 9.0)):
        for number in numbers:
            with contextlib.suppress(OSError):
                os.write(number, text)


@hostile(EITHER)
def writes_to_all_pipes(completion, item):
    scribble(set(pipes()))


@hostile(EITHER)
def writes_to_every_descriptor(completion, item):
    scribble(set(range(3, 1024)))


@hostile(EITHER)
def writes_later(completion, item):
    threading.Timer(0.02, scribble, [set(pipes())]).start()


@hostile(RIGHT)
def prints(completion, item):
    print("\0" * 9999, "\x1b[31m", flush=True)
    os.write(1, b"\xff" * 9999)
    assert sys.stdin.read() == ""


@hostile(EITHER)
def closes_everything(completion, item):
    os.closerange(0, 1024)


@hostile(RIGHT)
def opens_no_more_files(completion, item):
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


# --- files


@hostile(NONE)
def fills_the_disk(completion, item):
    with open(os.path.join(tempfile.mkdtemp(), "full"), "wb") as file:
        while True:
            file.write(bytes(2**20))


@hostile(RIGHT)
def fills_the_disk_without_a_word(completion, item):
    with contextlib.suppress(OSError), open(os.path.join(tempfile.mkdtemp(), "full"), "wb") as file:
        while True:
            file.write(bytes(2**20))


@hostile(RIGHT)
def leaves_files(completion, item):
    for _ in range(50):
        tempfile.mkstemp()
    os.mkfifo(os.path.join(tempfile.gettempdir(), f"pipe{time.time_ns()}"))


# --- what it runs in, and what it returns


@hostile(EITHER)
def executes_text(completion, item):
    text = "import os, sys\nif os.fork() == 0:\n  os.execvp('sleep', ['sleep', '3141'])\nos.environ.clear()\nraise SystemExit"
    exec(text, {})


@hostile(EITHER)
def pretends_to_be_another(completion, item):
    os.getpid = lambda: 1


@hostile(RIGHT)
def wanders_off(completion, item):
    os.chdir("/")
    sys.path.clear()
    os.environ.clear()


@hostile(RIGHT)
def changes_its_row(completion, item):
    item.clear()


@hostile(NONE)
def raises_loudly(completion, item):
    raise RuntimeError("\x1b[31mred\x1b]0;title\x07" + "x" * 10**6)


@hostile(NONE)
def raises_what_cannot_be_shown(completion, item):
    class OddError(Exception):
        def __str__(self):
            raise ValueError("no text")

    raise OddError


@hostile(NONE)
def returns_nan(completion, item):
    return float("nan")


@hostile(NONE)
def returns_what_float32_cannot_hold(completion, item):
    return 1e39


@hostile(NONE)
def returns_text(completion, item):
    return "1.0"
