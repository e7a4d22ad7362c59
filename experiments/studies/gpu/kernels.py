"""The attention kernels of the accelerator that is here, beside the plain form: differences and seconds, one JSON line each.

    python -m experiments.studies.gpu.kernels --chip=h100 > kernels.jsonl        (--chip: whose peak a share is counted of)

Forward and backward together, of one microbatch; on a CPU kernels are interpreted, small shapes only, and seconds say nothing.
"""

import argparse
import dataclasses
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models.architecture import Architecture
from grpo_jax.models.attention import AttentionView, KVCache, Prefix, attend, make_views
from grpo_jax.models.flash import CausalRows
from grpo_jax.parallel.hardware import Hardware
from grpo_jax.tools.plan import chips

CALLS = 10


@dataclasses.dataclass(frozen=True)
class Shape:
    """P prompts of S tokens, G completions of each of T tokens; K heads of keys, each read by R of queries, H channels."""

    P: int
    G: int
    S: int
    T: int
    K: int
    R: int
    H: int
    window: int | None = None
    cap: float | None = None

    @property
    def flops(self) -> float:
        """Products that a causal row needs, forward and backward: 2 and 5 of each pair. No window is counted."""
        pairs = self.T * self.S + self.T * (self.T + 1) / 2
        return 7 * 2.0 * self.P * self.G * self.K * self.R * self.H * pairs


LARGE = (
    Shape(4, 8, 256, 1024, 2, 7, 64),  # Qwen2.5-0.5B
    Shape(2, 8, 256, 1024, 4, 7, 128),  # Qwen2.5-7B
    Shape(1, 8, 1024, 4096, 8, 4, 128),  # Llama-3-8B, long
    Shape(1, 8, 512, 1024, 4, 2, 256, 512, 50.0),  # Gemma 2
)
SMALL = (Shape(1, 2, 40, 160, 1, 2, 64), Shape(1, 2, 40, 160, 1, 2, 128, 100, 30.0))


def arrays_of(shape: Shape, dtype) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Draw queries, keys and values, the prompts' keys and values, and a mask of prompts of which one has padding before it."""
    rng = np.random.default_rng(0)
    B = shape.P * shape.G
    sizes = [(B, shape.T, shape.K * shape.R, shape.H), *[(B, shape.T, shape.K, shape.H)] * 2]
    sizes += [(shape.P, shape.S, shape.K, shape.H)] * 2
    arrays = tuple(jnp.asarray(rng.normal(size=size) * (0.3 if place == 0 else 1.0), dtype) for place, size in enumerate(sizes))
    return arrays, jnp.arange(shape.S)[None] >= jnp.where(jnp.arange(shape.P) == 0, shape.S // 3, 0)[:, None]


def view_of(shape: Shape, mask_PS: jax.Array, hardware: Hardware | None) -> AttentionView:
    """Return what a layer's completions see. hardware: whose kernels are to run; None: plain operations."""
    local = {"sliding_window": shape.window, "local_layers": (0,)} if shape.window else {}
    arch = Architecture(1, shape.H, 1, shape.K * shape.R, shape.K, shape.H, 1, **local)
    prefix, B = Prefix.of(None, mask_PS), shape.P * shape.G
    positions_BT = jnp.repeat(prefix.lengths_P, shape.G)[:, None] + jnp.arange(shape.T)
    rows = None
    if hardware is not None:
        own_BT = jnp.ones((B, shape.T), jnp.int32)
        rows = CausalRows(own_BT, mask_PS.astype(jnp.int32), None, shape.window, False, hardware)
    causal_1TT = jnp.tril(jnp.ones((1, shape.T, shape.T), bool))
    return make_views(arch, positions_BT, positions_BT, causal_1TT, prefix, rows)[0]


def timed(function, *args):
    """Return (its results, median seconds of a call)."""
    found, secs = jax.block_until_ready(function(*args)), []
    for _ in range(CALLS):
        began = time.perf_counter()
        jax.block_until_ready(function(*args))
        secs.append(time.perf_counter() - began)
    return found, statistics.median(secs)


def difference(found, expected) -> float:
    """Return the largest difference, as a share of the largest number."""
    f32 = [(np.asarray(x, np.float32), np.asarray(y, np.float32)) for x, y in zip(found, expected, strict=True)]
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in f32)


def measure(shape: Shape, hardware: Hardware, dtype, peak_flops: float | None) -> dict:
    """Compare the kernels with the plain form in float32, and with its seconds in `dtype`."""
    arrays, mask_PS = arrays_of(shape, dtype)
    weight_BTNH = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), dtype)

    def value_and_grads(hardware: Hardware | None):
        def weighted(q_BTNH, own_k, own_v, prompt_k, prompt_v, weight_BTNH):
            own, prompt, view = KVCache.of(own_k, own_v), KVCache.of(prompt_k, prompt_v), view_of(shape, mask_PS, hardware)
            out_BTNH = attend(q_BTNH, own, view, prompt, 1.0, shape.cap)
            return (out_BTNH.astype(jnp.float32) * weight_BTNH).sum(), out_BTNH

        return jax.jit(jax.grad(weighted, tuple(range(5)), has_aux=True))

    grads_of_plain = value_and_grads(None)
    (grads, out), secs = timed(value_and_grads(hardware), *arrays, weight_BTNH)
    (plain_grads, plain_out), plain_secs = timed(grads_of_plain, *arrays, weight_BTNH)
    with jax.default_matmul_precision("highest"):
        exact_grads, exact_out = jax.jit(grads_of_plain)(*(x.astype(jnp.float32) for x in (*arrays, weight_BTNH)))
    return {
        **dataclasses.asdict(shape),
        "dtype": str(jnp.dtype(dtype)),
        "device": jax.devices()[0].device_kind,
        "kernel_difference": difference([out, *grads], [exact_out, *exact_grads]),
        "plain_difference": difference([plain_out, *plain_grads], [exact_out, *exact_grads]),
        "kernel_secs": secs,
        "plain_secs": plain_secs,
        "kernel_peak_share": None if peak_flops is None else shape.flops / secs / peak_flops,
    }


def main():
    """Print a line for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=sorted(chips.CHIPS))
    args = parser.parse_args()
    peak_flops = chips.find_chip(args.chip).flops_per_s if args.chip else None
    platform = jax.default_backend()
    if platform == "cpu":
        cases = [(shape, Hardware(name, interpret=True), jnp.float32) for name in ("gpu", "tpu") for shape in SMALL]
    else:
        cases = [(shape, Hardware(platform), dtype) for dtype in (jnp.float32, jnp.bfloat16) for shape in LARGE]
    for shape, hardware, dtype in cases:
        print(json.dumps({"kernels": hardware.platform, **measure(shape, hardware, dtype, peak_flops)}), flush=True)


if __name__ == "__main__":
    main()
