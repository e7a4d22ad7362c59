"""Running the command-line programs as a user would: in a process of their own, with compiled programs kept between runs."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
TIMINGS = ("time/", "tokens/s")

# Compiling is most of the time here, and code that is not optimised is quicker to make. So is that of XLA's older emitters of
# fused loops, which went with jaxlib 0.11; XLA ends a process that sets a flag which it does not know.
COMPILED_QUICKLY = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    COMPILED_QUICKLY += " --xla_cpu_use_fusion_emitters=false"
# Where the tests of this process run, and how; programs that they start are always for the CPU.
PLATFORM = os.environ.get("GRPO_JAX_TESTS_PLATFORM", "cpu")
XLA_FLAGS = f"--xla_force_host_platform_device_count=8 {COMPILED_QUICKLY}" if PLATFORM == "cpu" else ""


def environment(num_devices=1, cache=None):
    """What a program is told about its devices and where compiled programs are kept, as environment variables."""
    flags = f"--xla_force_host_platform_device_count={num_devices} {COMPILED_QUICKLY}"
    env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    if cache is not None:
        env |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    return env


def start(module, *args, num_devices=1, cache=None):
    """The process; it leads a group of its own, so that it can be killed with all it has started."""
    env = dict(os.environ, **environment(num_devices, cache))
    command = [sys.executable, "-m", module, *args]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=env, process_group=0, **pipes)


def run(module, *args, **kwargs):
    """-> (exit status, output)."""
    process = start(module, *args, **kwargs)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def records(workdir):
    """metrics.jsonl without what a clock decides."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMINGS)} for line in lines]


@contextlib.contextmanager
def together(module, num_processes, args, num_devices, cache=None):
    """-> processes that meet at a free port, with so many devices each. args: (port, process) -> its arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(module, *args(port, i), num_devices=num_devices, cache=cache) for i in range(num_processes)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def summary(workdir):
    """What a finished run says of itself."""
    return json.loads((workdir / "summary.json").read_text())
