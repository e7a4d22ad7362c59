"""The batch that the frameworks' own losses are computed on, and the file of numbers that tests/test_parity.py reads."""

import importlib.metadata
import json
import pathlib
import sys

import numpy as np

B, T, G = 16, 7, 4
BUDGET = 11


def make_batch():
    """Ragged rows, ratios on both sides of every bound, one advantage a row."""
    rng = np.random.default_rng(0)
    lengths_B = rng.integers(1, T + 1, B)
    lengths_B[:2] = 1, T
    logp_BT = -rng.uniform(0.1, 4.0, (B, T))
    return {
        "mask": (np.arange(T)[None] < lengths_B[:, None]).astype(float),
        "logp": logp_BT,
        "old_logp": logp_BT + 0.25 * rng.normal(size=(B, T)) + 0.15 * rng.choice([-1.0, 1.0], (B, 1)),
        "ref_logp": logp_BT + 0.4 * rng.normal(size=(B, T)),
        "entropy": rng.uniform(0.0, 3.0, (B, T)),
        "advantage": rng.normal(size=B),
        "rewards": np.stack([rng.integers(0, 2, B), 0.1 * rng.integers(0, 4, B)], 1).astype(float),
    }


def write(out: pathlib.Path, libraries, batch, losses, advantages, **more):
    """Write numbers with how they came about. libraries: whose versions are noted. more: further numbers by name."""
    found = {
        "command": f"python {' '.join(sys.argv)}",
        "versions": {**{name: importlib.metadata.version(name) for name in libraries}, "python": sys.version.split()[0]},
        "group_size": G,
        "max_completion_length": BUDGET,
        "batch": {key: np.asarray(value).tolist() for key, value in batch.items()},
        "losses": losses,
        "advantages": advantages,
        **more,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
