"""Small models, prompts, batches and configs that several test files share: seconds to compile, ragged everywhere."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from grpo_jax.config import Config, LearnerConfig, MeshConfig, OverlongConfig, RolloutConfig, parse_config
from grpo_jax.configs import base
from grpo_jax.learner.hyperparams import hyperparams_of
from grpo_jax.models.architecture import Architecture, Delta, Rope
from grpo_jax.models.transformer import init_params
from grpo_jax.parallel.sharding import AXES
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.types import Batch, Prompts, Rollout, TrainState

VOCAB = 23
LLAMA = Architecture(
    vocab_size=VOCAB, dim=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4, ffn_dim=24, tie_embeddings=False
)
DELTA = Architecture(  # two gated delta nets below a layer of attention, twice: scanned over both
    vocab_size=VOCAB,
    dim=16,
    num_layers=6,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=24,
    rope=Rope(1e4, share=0.5),
    norm_eps=1e-2,  # a state's answer may be next to nothing, and its norm would make much of what was lost in rounding
    qk_norm=True,
    norm_plus_one=True,
    has_output_gate=True,
    mixers=("gated_delta", "gated_delta", "attention"),
    delta=Delta(num_key_heads=2, num_value_heads=4, key_dim=4, value_dim=6, conv_width=4),
)


@contextlib.contextmanager
def compilations():
    """-> a list that gets an entry for each program that JAX compiles, or takes from its cache on disk, meanwhile."""
    happened: list[str] = []
    is_over: list[bool] = []  # jax 0.7 has no public way to take a listener back

    def listen(event, duration_secs, **_):
        if not is_over and event == "/jax/core/compile/backend_compile_duration":
            happened.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield happened
    finally:
        is_over.append(True)


@functools.cache
def random_params(arch, seed=0):
    """Every leaf random, norms and biases too: a fresh model's ones and zeros would hide a mistake in how they are used."""
    rng = np.random.default_rng(seed)
    # Six layers whose norms double what enters them would make more of each rounding than a comparison could bear.
    is_centred_at_zero = arch.norm_plus_one and arch.delta is not None

    def fill(path, shape):
        noise, name = 0.4 * rng.normal(size=shape.shape), jax.tree_util.keystr(path)
        is_one = "norm" in name and (not is_centred_at_zero or "['attn']['norm']" in name)
        return jnp.asarray(noise + is_one, jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(lambda: init_params(arch, jax.random.key(0))))


def random_prompts(num_prompts, width, vocab=VOCAB, seed=0):
    """Left-padded to `width`; the first has one token, the second no padding."""
    rng = np.random.default_rng(seed)
    lengths_P = rng.integers(1, width + 1, num_prompts)
    lengths_P[:2] = [1, width][:num_prompts]
    mask_PS = np.arange(width)[None] >= width - lengths_P[:, None]
    tokens_PS = np.where(mask_PS, rng.integers(1, vocab, (num_prompts, width)), 0)
    return Prompts(jnp.asarray(tokens_PS, jnp.int32), jnp.asarray(mask_PS), jnp.arange(num_prompts))


def random_batch(num_prompts=8, group_size=4, max_tokens=5, prompt_width=4, vocab=VOCAB, seed=0):
    """A batch that no policy sampled: ragged rows of random tokens, log-probs around the uniform one, 0/1 rewards.

    Group 1 is all successes, group 2 all failures; rewards of one row in four are shaped. Nothing is cut off the support.
    """
    P, G, T = num_prompts, group_size, max_tokens
    rng = np.random.default_rng(seed)
    lengths_PG = rng.integers(1, T + 1, (P, G))
    mask_PGT = (np.arange(T)[None, None] < lengths_PG[..., None]).astype(np.float32)
    task_reward_PG = rng.integers(0, 2, (P, G)).astype(np.float32)
    task_reward_PG[0, :2] = [0, 1]
    task_reward_PG[1:3] = np.array([1, 0])[: P - 1, None]
    shaping_PG = np.where(rng.random((P, G)) < 0.25, -0.5, 0.0)
    arrays = dict(
        tokens_PGT=np.where(mask_PGT > 0, rng.integers(1, vocab, (P, G, T)), 0).astype(np.int32),
        mask_PGT=mask_PGT,
        sampler_logp_PGT=((-np.log(vocab) + rng.normal(size=(P, G, T)) * 0.5) * mask_PGT).astype(np.float32),
        entropy_PGT=(rng.uniform(0.1, 3.0, (P, G, T)) * mask_PGT).astype(np.float32),
        is_truncated_PG=(lengths_PG == T) & (rng.random((P, G)) < 0.5),
    )
    rollout = Rollout(
        prompts=random_prompts(P, prompt_width, vocab, seed), support_PGT=None, **jax.tree.map(jnp.asarray, arrays)
    )
    reward_PG = (task_reward_PG + shaping_PG).astype(np.float32)
    return Batch(rollout, jnp.asarray(task_reward_PG), jnp.asarray(reward_PG), jnp.zeros(P, jnp.int32))


def with_rollout(batch, **changes):
    """The batch with some fields of its rollout replaced."""
    return batch.replace(rollout=batch.rollout.replace(**changes))


def state_of(params, optimizer, ref_params=None, step=0, pending=None, config=None):
    """A state to train with by an optax optimizer; its numbers are those of `config` (default: the defaults)."""
    state = TrainState(jnp.int32(step), params, optimizer.init(params), None, ref_params, jnp.int32(0), pending)
    return dataclasses.replace(state, hyperparams=hyperparams_of(config or Config()))


def update_config(objective, sampling=None, max_completion_tokens=5, filter_truncated=False, seed=0, **learner):
    """The parts of a Config that an update reads. learner: fields of LearnerConfig; the one bucket is the whole budget."""
    sampling = sampling or Sampling()
    rollout = RolloutConfig(
        max_completion_tokens=max_completion_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
    )
    return Config(
        seed=seed,
        objective=objective,
        rollout=rollout,
        learner=LearnerConfig(**{"bucket_tokens": 0, **learner}),
        overlong=OverlongConfig(filter=filter_truncated),
        mesh=MeshConfig(fsdp_min_elements=2**20),  # rows are spread over fsdp, weights are not; see test_mesh.py
    )


def mesh_of(num_devices, fsdp=1):
    """A mesh over the first devices, with the axes that the package uses. Skips the test where there are fewer."""
    if num_devices > len(jax.devices()):
        pytest.skip(f"{num_devices} devices")  # of `make test-gpu`
    devices = np.array(jax.devices()[:num_devices]).reshape(num_devices // fsdp, fsdp, 1, 1, 1)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def config_of(variant="grpo", changes=None):
    """A Config of the smallest scale, further shrunk. changes: {"rollout.num_prompts": 4, ...}."""
    raw = base.get_config("runlocal", variant)
    raw.update_from_flattened_dict(
        {
            "model.dim": 16,
            "model.num_heads": 2,
            "model.num_kv_heads": 1,
            "model.ffn_dim": 24,
            "warm_start.num_steps": 0,
            "mesh.data": 1,
            "rollout.num_prompts": 4,
            "learner.logprob_chunk_tokens": 64,
            **(changes or {}),
        }
    )
    return parse_config(raw)


def largest_difference(left, right):
    """max |left - right| over two trees, as a share of the largest |right|."""
    left, right = (jax.tree.leaves(jax.device_get(tree)) for tree in (left, right))
    assert left
    return max(np.abs(x - y).max() for x, y in zip(left, right, strict=True)) / max(np.abs(y).max() for y in right)


@dataclasses.dataclass(frozen=True)
class Bigram:
    """Stands in for a ModelDef where the decoder does not matter: each state knows its token and the mean of its prompt."""

    lora: None = None
    hardware: None = None
    adds_gradients_in_place: bool = False

    def bind(self, params):
        return BigramDecoder(params)


class BigramDecoder:
    logit_cap = tiles = None

    def __init__(self, params):
        self.embed_VD, self.head_VD = params["embed"], params["head"]

    def forward_with_prefix(self, tokens_PS, mask_PS, tokens_BT, mask_BT, share=None, sums=None, tables=None):
        del mask_BT, share, sums, tables  # one device, and nothing to add to
        last_PD, prefix_PD = self.encode_prompts(tokens_PS, mask_PS)
        hidden_BTD = self.embed_VD[tokens_BT]
        of_row_BD = jnp.repeat(prefix_PD, len(hidden_BTD) // len(prefix_PD), axis=0)
        return last_PD, jnp.tanh(hidden_BTD + of_row_BD[:, None]), None

    def no_routing(self, tokens_BT):
        del tokens_BT  # it has no experts

    def encode_prompts(self, tokens_PS, mask_PS):
        sum_PD = (self.embed_VD[tokens_PS] * mask_PS[..., None]).sum(1)
        prefix_PD = sum_PD / jnp.maximum(mask_PS.sum(1, keepdims=True), 1)
        return jnp.tanh(self.embed_VD[tokens_PS[:, -1]] + prefix_PD), prefix_PD


def bigram_params(vocab=VOCAB, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(0.5 * rng.normal(size=(vocab, dim)), jnp.float32) for name in ("embed", "head")}
