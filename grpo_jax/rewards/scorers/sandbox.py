"""The process that runs what a model wrote: python -I sandbox.py <mode> <folder> <memory MiB> <seconds> <0 or 1: network>

A script that imports the standard library alone, for one starts for every test. Before anything of the model runs, it gives up
what the kernel lets it give up (all on Linux, by decreasing age):

- memory, time, size and number of files, by limits;
- the network, other processes and their signals, by namespaces of its own (`unshare`; not allowed in some containers);
- writing outside its folder, by Landlock (Linux 5.13).

Modes: `program` executes <folder>/program.py with the given stdin and stdout. `calls` and `asserts` read JSON from stdin, run
the program, then calls of one of its functions or further statements, and write what came of them, a line of JSON each.
"""

import builtins
import contextlib
import ctypes
import json
import os
import resource
import signal
import sys

NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x08000000, 0x10000000, 0x20000000, 0x40000000  # of unshare(2)
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # numbers of the system calls, the same on all machines
WRITES = 0x1FF2  # Landlock: write_file, and make and remove everything
READS_TOO = 0x1FFE
MAX_FILE_BYTES, MAX_FILES, MAX_PROCESSES = 1 << 24, 64, 32
UNCONFINED = 97  # exit status where the network was to be given up and could not be


def confine(folder: str, memory_mb: int, seconds: int, has_network: bool) -> None:
    """Give up what the program must not have, and become its process."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
    is_alone = libc is not None and _unshare(libc, has_network)
    if not is_alone and not has_network:
        os._exit(UNCONFINED)
    for name, limit in (
        ("RLIMIT_AS", memory_mb << 20),
        ("RLIMIT_CPU", seconds + 1),
        ("RLIMIT_FSIZE", MAX_FILE_BYTES),
        ("RLIMIT_NOFILE", MAX_FILES),
        ("RLIMIT_CORE", 0),
    ):
        _limit(name, limit)
    if is_alone:
        # Elsewhere it would count all processes of the user.
        _limit("RLIMIT_NPROC", MAX_PROCESSES)
    if libc is not None:
        _write_in(libc, folder)
    os.chdir(folder)


def _limit(name: str, limit: int) -> None:
    """Lower a limit, if it is not lower already."""
    number = getattr(resource, name)
    allowed = resource.getrlimit(number)[1]
    if allowed != resource.RLIM_INFINITY:
        limit = min(limit, allowed)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(number, (limit, limit))


def _unshare(libc: ctypes.CDLL, has_network: bool) -> bool:
    """Go on in namespaces of its own, two processes further down; False where the kernel does not allow it."""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_USER | NEW_PID | NEW_IPC | (0 if has_network else NEW_NET)) != 0:
        return False
    for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with contextlib.suppress(OSError), open(f"/proc/self/{file}", "w") as out:
            out.write(text)
    # The first process of the namespace ends all others with itself, and ignores what would end it: so it runs nothing.
    for _ in range(2):
        parent = os.getpid()
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            code = abs(os.waitstatus_to_exitcode(status))
            os._exit(1 if code == UNCONFINED else min(255, code))
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() not in (0, parent):
            os._exit(1)
    return True


def _write_in(libc: ctypes.CDLL, folder: str) -> None:
    """Forbid to change files outside of a folder, where the kernel knows Landlock."""
    handled = ctypes.c_uint64(WRITES)
    rules = libc.syscall(LANDLOCK_CREATE, ctypes.byref(handled), ctypes.sizeof(handled), 0)
    if rules < 0:
        return
    for path, allowed in ((folder, WRITES), (os.devnull, 2)):
        place = os.open(path, os.O_PATH)
        rule = (ctypes.c_uint8 * 12).from_buffer_copy(allowed.to_bytes(8, sys.byteorder) + place.to_bytes(4, sys.byteorder))
        libc.syscall(LANDLOCK_ADD, rules, 1, ctypes.byref(rule), 0)
        os.close(place)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.syscall(LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def run_program(folder: str) -> dict:
    """Execute the program as the main module; -> its names."""
    with open(os.path.join(folder, "program.py"), encoding="utf-8") as file:
        code = compile(file.read(), "program.py", "exec")
    names = {"__name__": "__main__", "__builtins__": builtins}
    exec(code, names)
    return names


def run_job(folder: str, job: dict) -> None:
    """Run the program, then the job's calls or statements; a line of JSON for each that came to its end."""
    # What the program prints is nobody's result.
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    names = run_program(folder)
    if "statements" in job:
        for number, statement in enumerate(job["statements"]):
            with contextlib.suppress(Exception):
                exec(compile(statement, "test.py", "exec"), names)
                print(json.dumps([job["secret"], number]), file=results, flush=True)
        return
    if job["name"] in names:
        function = names[job["name"]]
    else:
        function = getattr(names["Solution"](), job["name"])
    for number, args in enumerate(job["calls"]):
        with contextlib.suppress(Exception):
            print(json.dumps([number, function(*args)]), file=results, flush=True)


def main() -> None:
    """Confine this process, and run what it is asked to."""
    mode, folder, memory_mb, seconds, has_network = sys.argv[1:]
    confine(folder, int(memory_mb), int(seconds), has_network == "1")
    sys.argv = ["program.py"]
    if mode == "program":
        run_program(folder)
    else:
        run_job(folder, json.load(sys.stdin))


if __name__ == "__main__":
    main()
