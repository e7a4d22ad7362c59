"""Where results come from: date, commit, machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess

import jax

from grpo_jax import __version__


def provenance() -> dict[str, str]:
    """Collect for a run's records: date (UTC), version, commit (empty if unknown), jax, devices ("1 x NVIDIA H200")."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "version": __version__,
        "commit": commit(),
        "jax": jax.__version__,
        "devices": f"{jax.device_count()} x {device_kind()}",
    }


def commit() -> str:
    """Return the short hash of the checkout that this package runs from, -dirty with changes, or that pip installed it from.

    Empty where neither is known, as in a wheel.
    """
    folder = pathlib.Path(__file__).parent
    # An installed copy may be inside of someone else's checkout: that one does not track this file.
    tracked = _git(folder, "ls-files", pathlib.Path(__file__).name)
    if tracked:
        return _git(folder, "describe", "--always", "--dirty", "--exclude=*")
    return installed_commit()


def installed_commit() -> str:
    """Return the short hash that `pip install git+...` noted beside the package; empty if it came from elsewhere."""
    # PEP 610: an editable install and a wheel from a file leave the same file, without vcs_info.
    try:
        noted = importlib.metadata.distribution("grpo_jax").read_text("direct_url.json")
        return json.loads(noted or "{}").get("vcs_info", {}).get("commit_id", "")[:7]
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ""


def device_kind() -> str:
    """Name the device that jax computes on; a CPU by its model's name where Linux tells it."""
    # JAX calls every CPU "cpu", and seconds say nothing without the machine they were measured on.
    kind = jax.devices()[0].device_kind
    cpu_info = pathlib.Path("/proc/cpuinfo")
    if jax.default_backend() != "cpu":
        return kind
    found = re.search(r"^model name\s*:\s*(.+)$", cpu_info.read_text(), re.M) if cpu_info.exists() else None
    return f"{kind} ({found[1] if found else platform.machine()}, {os.cpu_count()} cores)"


def _git(folder: pathlib.Path, *command: str) -> str:
    try:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
