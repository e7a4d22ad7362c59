"""What every system is measured on, and how. The standard library only: each system runs in an environment of its own.

Random weights, prompts and completions of one length, seeded tokens; nothing ends a completion early. Every system clips the
gradient's norm to 1, takes an AdamW step and reports the policy's entropy; with beta > 0 it also scores the reference policy.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")
PAD = 1  # token id; random tokens are drawn from FIRST on
FIRST = 3
LEARNING_RATE = 1e-6
WHATS = ("rollout", "update", "step", "mem")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama-style decoder with tied embeddings, and its default batch."""

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    rope_theta: float
    prompts: int
    group_size: int
    warmup: int
    repeats: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def never(self) -> int:
        """A stop token that cannot be sampled: it lies outside the vocabulary."""
        return self.vocab_size


SHAPES = {
    "tiny": Shape(512, 256, 4, 8, 4, 704, 10_000.0, prompts=4, group_size=8, warmup=2, repeats=7),
    "smol": Shape(49_152, 576, 30, 9, 3, 1536, 100_000.0, prompts=2, group_size=4, warmup=1, repeats=4),  # SmolLM2-135M's
    "qwen": Shape(151_936, 896, 24, 14, 2, 4864, 1e6, prompts=32, group_size=8, warmup=2, repeats=7),  # Qwen2.5-0.5B's
    "qwen3": Shape(151_936, 2048, 28, 16, 8, 6144, 1e6, prompts=32, group_size=8, warmup=2, repeats=7),  # Qwen3-1.7B's
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """One measurement. microbatch: rows at a time, 0: all. warmup: untimed calls, the first (which compiles) included."""

    model: str
    what: str
    beta: float
    dtype: str
    remat: bool
    microbatch: int
    prompts: int
    group_size: int
    prompt_len: int
    completion_len: int
    warmup: int
    repeats: int

    @property
    def shape(self) -> Shape:
        return SHAPES[self.model]

    @property
    def rows(self) -> int:
        return self.prompts * self.group_size

    @property
    def rows_at_a_time(self) -> int:
        return self.microbatch or self.rows

    @property
    def num_tokens(self) -> int:
        """What counts: completion tokens of a rollout or step, all tokens of an update's rows."""
        is_sampled = self.what in ("rollout", "step")
        return self.rows * (self.completion_len + (0 if is_sampled else self.prompt_len))

    def prompt_ids(self) -> list[list[int]]:
        """[P, S] tokens."""
        return random_ids(self.prompts, self.prompt_len, self.shape.vocab_size, seed=0)

    def completion_ids(self) -> list[list[int]]:
        """[B, T] tokens."""
        return random_ids(self.rows, self.completion_len, self.shape.vocab_size, seed=1)


def random_ids(num_rows: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Rows of token ids, special ones left out."""
    rng = random.Random(seed)
    return [[rng.randrange(FIRST, vocab_size) for _ in range(length)] for _ in range(num_rows)]


def advantage(row: int) -> float:
    """Half of every group did well."""
    return 1.0 if row % 2 else -1.0


def as_text(ids: Sequence[int]) -> str:
    """Words for the peers' tokenizers: token 17 is t17."""
    return " ".join(f"t{i}" for i in ids)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that all systems share. Those without a value are None until `fill`."""
    parser.add_argument("--what", choices=WHATS, required=True)
    parser.add_argument("--model", choices=list(SHAPES), help="tiny: 4 layers of width 256; smol: SmolLM2-135M's shape")
    parser.add_argument("--beta", type=float, help="weight of the KL penalty (0)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of activations and products (float32)")
    parser.add_argument("--remat", action="store_const", const=True, help="recompute layers in the backward pass")
    parser.add_argument("--microbatch", type=int, help="rows at a time; 0: all at once (0)")
    parser.add_argument("--prompts", type=int, help="tiny 4, smol 2")
    parser.add_argument("--group-size", type=int, help="completions of each prompt: tiny 8, smol 4")
    parser.add_argument("--prompt-len", type=int, help="tokens (64)")
    parser.add_argument("--completion-len", type=int, help="tokens (128)")
    parser.add_argument("--warmup", type=int, help="untimed calls, the first one included: tiny 2, smol 1")
    parser.add_argument("--repeats", type=int, help="timed calls: tiny 7, smol 4")


def fill(args: argparse.Namespace) -> argparse.Namespace:
    """The flags with what was not given filled in, for the workloads of SHAPES."""
    shape = SHAPES[args.model or "tiny"]
    usual = {
        "model": "tiny",
        "beta": 0.0,
        "dtype": "float32",
        "remat": False,
        "microbatch": 0,
        "prompt_len": 64,
        "completion_len": 128,
        **{name: getattr(shape, name) for name in ("prompts", "group_size", "warmup", "repeats")},
    }
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**{**vars(args), **usual, **given})


def parse(argv: Sequence[str] | None = None) -> Workload:
    """Command line -> Workload."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    args = fill(parser.parse_args(argv))
    workload = Workload(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Workload)})
    if workload.rows % workload.rows_at_a_time:
        parser.error(f"--microbatch={workload.microbatch}: does not divide the {workload.rows} rows")
    return workload


@dataclasses.dataclass(frozen=True)
class Timing:
    """began, ended: the timed calls, on time.perf_counter's clock. secs, tokens: of each of them. memory: MB, by name."""

    first_secs: float
    began: float
    ended: float
    secs: list[float]
    tokens: list[float]
    memory: dict[str, float | None]


def timed(call: Callable[[int], Result], count: Callable[[Result], float], warmup: int, repeats: int) -> Timing:
    """Time calls. `call(i)` returns when its work is done; `count`, outside the clock, gives the tokens it is worth."""
    before = rss_mb("VmRSS")

    def once(i: int) -> tuple[float, float]:
        began = time.perf_counter()
        result = call(i)
        return time.perf_counter() - began, count(result)

    first_secs, _ = once(0)
    peak = rss_mb("VmHWM")
    reset_peak()
    for i in range(1, warmup):
        once(i)
    began = time.perf_counter()
    secs, tokens = zip(*(once(i) for i in range(max(warmup, 1), max(warmup, 1) + repeats)), strict=True)
    ended, steady = time.perf_counter(), rss_mb("VmHWM")
    memory = {
        "rss_before_mb": before,
        "peak_rss_mb": None if peak is None or steady is None else max(peak, steady),
        "peak_rss_steady_mb": steady,
    }
    return Timing(first_secs, began, ended, list(secs), list(tokens), memory)


def timed_by_marks(began: float, marks: list[float], workload: Workload) -> Timing:
    """The same from the times at which a system's own loop ended its steps."""
    secs = [after - before for before, after in zip([began, *marks], marks, strict=False)]
    start = max(workload.warmup, 1)
    kept = secs[start : start + workload.repeats]
    memory = {"peak_rss_mb": rss_mb("VmHWM")}
    return Timing(secs[0], marks[start - 1], marks[-1], kept, [float(workload.num_tokens)] * len(kept), memory)


def report(system: str, version: str, workload: Workload, timing: Timing) -> dict[str, Any]:
    """The JSON object of one measurement."""
    rates = [tokens / secs for tokens, secs in zip(timing.tokens, timing.secs, strict=True)]
    return {
        "system": system,
        "version": version,
        **dataclasses.asdict(workload),
        "tokens": statistics.median(timing.tokens),
        "tokens_per_s": round(statistics.median(rates), 1),
        "median_s": round(statistics.median(timing.secs), 5),
        "min_s": round(min(timing.secs), 5),
        "max_s": round(max(timing.secs), 5),
        "first_call_s": round(timing.first_secs, 3),
        **timing.memory,
        "cpus": os.cpu_count(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def emit(record: dict[str, Any]) -> None:
    """The record as the last line of standard output, below whatever the libraries wrote."""
    print(json.dumps(record), flush=True)


def rss_mb(field: str) -> float | None:
    """A memory field of this process, MB (Linux; elsewhere None)."""
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((round(int(line.split()[1]) / 1024, 1) for line in lines if line.startswith(f"{field}:")), None)


def reset_peak() -> None:
    """Have VmHWM start again from what is held now (Linux)."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
