"""One process at a time in a run's folder: a file that says who has it, and a sign of life for those who cannot ask for him."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator

from grpo_jax.errors import RunError, UserError
from grpo_jax.files import note_once, parse_json_object

NAME = "lock"
BEAT_SECS = 10.0  # the owner touches the file so often
SILENT_SECS = 45.0  # an owner elsewhere who did not touch it for so long is gone


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process. machine: its boot, and the numbering its pid is of. start: clock ticks since boot, for a pid comes again."""

    host: str
    pid: int
    start: str
    machine: str

    @classmethod
    def myself(cls) -> Owner:
        """Describe this process."""
        return cls(socket.gethostname(), os.getpid(), start_of(os.getpid()), this_machine())

    @property
    def is_here(self) -> bool:
        """Its pid means something to this process."""
        return self.machine == this_machine()

    @property
    def is_alive(self) -> bool:
        """The process is there, and is not another one of the same pid. Only for one that is here."""
        with contextlib.suppress(PermissionError):  # of another user, so it is there
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return False
        return start_of(self.pid) == self.start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def this_machine() -> str:
    """Return what is the same in processes that see each other's pids: the boot's id and the namespace of pids."""
    # A host's name would not do: containers on one host have names of their own or none, and pids of their own.
    boot, space = pathlib.Path("/proc/sys/kernel/random/boot_id"), pathlib.Path("/proc/self/ns/pid")
    if not boot.exists() or not space.is_symlink():
        return socket.gethostname()
    return f"{boot.read_text().strip()} {os.readlink(space)}"


def start_of(pid: int) -> str:
    """Return when a process started, in ticks since boot; "" where the system does not say or there is none."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # behind the name, which may hold anything


class Lock:
    """A held lock. is_lost: somebody else took it, as if this process had gone."""

    def __init__(self, path: pathlib.Path):
        self.path, self.is_lost, self._ended = path, False, threading.Event()
        self._text = json.dumps(dataclasses.asdict(Owner.myself()))
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def acquire(self) -> None:
        """Take the lock, from an owner that is gone too. Raises UserError if it is another process's."""
        while not self._create():
            text = read_bytes(self.path)
            if text is None:
                continue  # gone since
            owner = parse_owner(text)
            if owner.is_here and owner.is_alive:
                raise UserError(f"{self.path}: {owner} is at work in this folder; wait for it, or end it first")
            if not owner.is_here and has_sign_of_life(self.path):
                raise UserError(f"{self.path}: {owner} is at work in this folder (the file is touched every {BEAT_SECS:.0f} s)")
            note_once(f"{self.path}: {owner} is gone without having removed it; going on")
            self._break(text)
        self._thread.start()

    def _create(self) -> bool:
        """Make the file if nobody has it."""
        # Linked and not opened: the file appears with its content, and a link to a name that exists fails on NFS too.
        own = self.path.with_name(f"{NAME}.{socket.gethostname()}.{os.getpid()}.{threading.get_native_id()}")
        own.write_text(self._text)
        try:
            os.link(own, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                with self.path.open("x") as file:
                    file.write(self._text)
            except FileExistsError:
                return False
        finally:
            own.unlink()
        return True

    def _break(self, text: bytes) -> None:
        """Remove the file of an owner that is gone. text: his; another's stays."""
        # Renamed first: of several processes that see the same dead owner one succeeds. What it has then may be the file of one
        # who was quicker, and holds the folder: he gets it back.
        away = self.path.with_name(f"{NAME}.gone.{socket.gethostname()}.{os.getpid()}.{threading.get_native_id()}")
        with contextlib.suppress(FileNotFoundError):
            if read_bytes(self.path) != text:
                return
            os.rename(self.path, away)
            if away.read_bytes() != text:
                with contextlib.suppress(FileExistsError):
                    os.link(away, self.path)
            away.unlink()

    def _beat(self) -> None:
        """Touch the file until the lock is released; notice if it is another's."""
        while not self._ended.wait(BEAT_SECS):
            try:
                self.is_lost = self.path.read_text() != self._text
                if not self.is_lost:
                    os.utime(self.path)
            except FileNotFoundError:
                self.is_lost = True
            except OSError:
                continue  # a network's file system that is away for a while

    def check(self) -> None:
        """Raise RunError if the lock is no longer this process's."""
        if self.is_lost:
            raise RunError(f"{self.path}: another process took this folder, or it was removed; this one ends without writing")

    def release(self) -> None:
        """Give the folder back."""
        self._ended.set()
        with contextlib.suppress(OSError):
            if self.path.read_text() == self._text:
                self.path.unlink()


def read_bytes(path: pathlib.Path) -> bytes | None:
    """Read a file; None if it is gone."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def parse_owner(text: bytes) -> Owner:
    """Read whose a lock is. One that cannot be read is nobody's that is here."""
    try:
        fields = parse_json_object(text)
        return Owner(str(fields["host"]), int(fields["pid"]), str(fields["start"]), str(fields["machine"]))
    except (KeyError, TypeError, ValueError):
        return Owner("an unknown host", 0, "", "unknown")


def has_sign_of_life(path: pathlib.Path) -> bool:
    """Watch a lock until its owner touches it, or has not for too long."""
    # By two looks at the file and never by the clock: those of two hosts differ.
    note_once(f"{path}: held by a process elsewhere; watching it for {SILENT_SECS:.0f} s")
    deadline = time.monotonic() + SILENT_SECS
    with contextlib.suppress(FileNotFoundError):
        before = path.stat().st_mtime_ns
        while time.monotonic() < deadline:
            time.sleep(min(1.0, SILENT_SECS / 10))
            if path.stat().st_mtime_ns != before:
                return True
    return False


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[Lock]:
    """Hold the lock of a folder, which is made if it is not there. Raises UserError if it is held or cannot be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = Lock(workdir / NAME)
        lock.acquire()
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        yield lock
    finally:
        lock.release()
