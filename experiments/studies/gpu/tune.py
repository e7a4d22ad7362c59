"""Sizes of blocks, warps and stages of the GPU's attention kernels: microseconds of each on the GPU that is here, JSON lines.

    python -m experiments.studies.gpu.tune decode > decode.jsonl
    python -m experiments.studies.gpu.tune forward
    python -m experiments.studies.gpu.tune backward

decode: one layer of a token; tb_per_s: of the bytes that it has to read. forward, backward: one layer of a microbatch.
"""

import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.studies.gpu import kernels
from grpo_jax.models.flash import attend, gpu, single
from grpo_jax.models.flash.call import Call
from grpo_jax.parallel.hardware import Hardware

HERE = Hardware(jax.default_backend(), interpret=jax.default_backend() == "cpu")
CALLS, ROUNDS = 30, 5
ROWS = single._rows_at_a_time
# P, G, S, U, slot, K, R, H
DECODE = {
    "qwen2.5-0.5b, 256 rows": (32, 8, 128, 256, 200, 2, 7, 64),
    "qwen2.5-0.5b, 1024 rows, long": (128, 8, 128, 1024, 700, 2, 7, 64),
    "qwen3-1.7b, 256 rows": (32, 8, 256, 1024, 700, 8, 2, 128),
}


def micros(call: Callable[[Any], Any], carry: Any) -> float:
    """Return the least mean time of a call among a few rounds of many, each on the last one's result. Microseconds."""
    carry, best = jax.block_until_ready(call(carry)), float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(CALLS):
            carry = call(carry)
        jax.block_until_ready(carry)
        best = min(best, (time.perf_counter() - began) / CALLS)
    return best * 1e6


def time_decode(sizes: tuple[int, ...], choice: tuple[int, ...]) -> dict[str, float]:
    """Time the kernel that decodes. choice: blocks, and the rows of a program, 0: as it chooses itself."""
    P, G, S, U, slot, K, R, H = sizes
    *blocks, rows = choice
    B, keys = P * G, itertools.count()

    def drawn(*shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(next(keys)), shape, jnp.bfloat16)

    new, prompt = (drawn(B, K, H), drawn(B, K, H)), (drawn(P, K, H, S), drawn(P, K, S, H))
    told = single.newest_tokens(HERE, jnp.full(B, slot), [jnp.ones((P, S), bool)], jnp.full(P, S), None)
    single._blocks = lambda _: single.Blocks(*blocks)
    single._rows_at_a_time = (lambda *_: rows) if rows else ROWS
    q_BNH = drawn(B, K * R, H)
    num_layers = 20  # one after the other in one call, so that the time of starting it does not count

    def call(cache):
        def layer(_, carry):
            q_BNH, cache = carry
            return single.attend_newest(q_BNH, new, cache, [prompt], told, H**-0.5)

        return jax.lax.fori_loop(0, num_layers, layer, (q_BNH, cache))[1]

    secs = micros(jax.jit(call, donate_argnums=0), (drawn(B, K, H, U), drawn(B, K, U, H))) / num_layers / 1e6
    num_bytes = 2 * 2 * K * H * (P * S + B * slot)
    return {"micros": secs * 1e6, "tb_per_s": num_bytes / secs / 1e12}


def time_flash(shape: kernels.Shape, is_backward: bool, blocks: tuple[int, ...]) -> dict[str, float]:
    """Time the forward kernel, or the three of the backward pass."""
    arrays, mask_PS = kernels.arrays_of(shape, jnp.bfloat16)
    q_BTNH, own_k, own_v, prompt_k, prompt_v = arrays
    laid_out = attend.lay_out(
        q_BTNH, *((k.swapaxes(1, 2), v.swapaxes(1, 2)) for k, v in ((own_k, own_v), (prompt_k, prompt_v)))
    )
    B = shape.P * shape.G
    masks = jnp.ones((B, shape.T), jnp.int32), mask_PS.astype(jnp.int32), None
    call = Call(HERE, shape.S, shape.cap, shape.window)
    out, lse = jax.jit(lambda x: gpu.forward(call, x, masks))(laid_out)
    gpu._blocks = lambda _, *, is_backward: gpu.Blocks(*blocks)
    if is_backward:
        kernel, given = jax.jit(lambda x: gpu.backward(call, x, masks)), (laid_out, out, lse, out)
    else:
        kernel, given = jax.jit(lambda x: gpu.forward(call, x, masks)), laid_out
    took, products = micros(lambda _: kernel(given), None), 7 if is_backward else 2  # scores are computed twice backward
    flops = shape.flops / 7 * products
    return {"micros": took, "tflops": flops / took / 1e6}


CHOICES = {
    "decode": [
        *[(64, 4, 3, 0), (64, 4, 2, 0), (64, 2, 2, 0), (32, 4, 4, 0), (32, 4, 3, 0), (32, 4, 2, 0), (32, 2, 3, 0)],
        *[(32, 4, 3, rows) for rows in (1, 2, 4)],
    ],
    "forward": [
        (128, 64, 8, 2),
        (128, 64, 4, 2),
        (128, 64, 4, 3),
        (64, 64, 4, 3),
        (64, 32, 4, 2),
        (64, 32, 8, 2),
        (32, 32, 4, 2),
    ],
    "backward": [
        (64, 64, 4, 2),
        (64, 64, 8, 1),
        (64, 64, 4, 3),
        (64, 32, 4, 2),
        (32, 32, 4, 2),
        (32, 32, 4, 1),
        (64, 32, 8, 1),
    ],
}


def main(what: str) -> None:
    """Print a line for each choice."""
    if what == "decode":
        for (name, shape), sizes in itertools.product(DECODE.items(), CHOICES[what]):
            report(name, sizes, functools.partial(time_decode, shape))
        return
    for shape, sizes in itertools.product(kernels.LARGE, CHOICES[what]):
        report(str(dataclasses.astuple(shape)), sizes, functools.partial(time_flash, shape, what == "backward"))


def report(name: str, choice: tuple[int, ...], measure: Callable[[Any], dict[str, float]]) -> None:
    """Print what was measured, or why it could not be."""
    try:
        found: dict[str, Any] = {key: round(value, 2) for key, value in measure(choice).items()}
    except Exception as error:  # a choice that does not fit is a result
        found = {"error": str(error)[:120]}
    print(json.dumps({"shape": name, "choice": choice, **found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
