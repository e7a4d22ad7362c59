"""What accelerators' programs do otherwise gives the same numbers: compiled here, for the CPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.learner.logprobs import policy_logprobs
from grpo_jax.models.architecture import Architecture
from grpo_jax.models.linear import FEW_ROWS, Linear, project
from grpo_jax.models.transformer import MAX_UNROLLED, ModelDef
from grpo_jax.parallel import hardware
from grpo_jax.parallel.hardware import Hardware, hardware_of
from grpo_jax.parallel.sharding import make_mesh, shard_map_over_batch
from grpo_jax.rollout.sampling import Sampling
from tests import tiny

DEEP = Architecture(tiny.VOCAB, 16, MAX_UNROLLED + 1, 2, 1, 8, 24, qkv_bias=True)
GPU = Hardware("gpu")


def test_cpus_have_no_hardware_of_their_own():
    assert hardware_of(tiny.mesh_of(2)) is None


def test_a_product_has_the_form_of_the_platform_that_is_compiled_for(monkeypatch):
    """A CPU's few rows have the weight on the left, behind a barrier; no other platform's do, whatever this process runs on."""
    x, weight = jnp.ones((4, 8)), jnp.ones((16, 8))

    def text():
        return jax.jit(lambda x: project(x, weight)).lower(x).as_text()

    assert "optimization_barrier" in text()
    mesh = tiny.mesh_of(1)
    monkeypatch.setattr(hardware, "platform_of", lambda _: "tpu")
    with hardware.compiling_for(mesh):
        assert "optimization_barrier" not in text()
    assert "optimization_barrier" in text()


@pytest.mark.parametrize("is_gathered", [False, True])
@pytest.mark.parametrize("shards_inputs", [False, True])
def test_a_products_gradients_where_several_devices_have_its_outputs(shards_inputs, is_gathered, monkeypatch):
    """On TPUs a matrix of which each device has some outputs is given the rows in full; one of some inputs is not."""
    mesh = make_mesh({"data": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2})
    graphdef, weights = nnx.split(Linear(16, 24, use_bias=True, shards_inputs=shards_inputs, rngs=nnx.Rngs(0)))
    of_tensor = NamedSharding(mesh, PartitionSpec(None, "tensor") if shards_inputs else PartitionSpec("tensor"))
    weights = jax.tree.map(lambda x: jax.device_put(x, of_tensor) if x.ndim == 2 else x, weights)
    x_BTI = jnp.asarray(np.random.default_rng(0).normal(size=(4, FEW_ROWS, 16)), jnp.float32)

    def loss(weights, x_BTI):
        return jnp.sin(nnx.merge(graphdef, weights)(x_BTI)).sum()

    def of_rows(weights, x_BTI):
        if is_gathered:  # as fsdp's are: other numbers to JAX on each device
            weights = jax.tree.map(lambda x: jax.lax.pcast(x, "fsdp", to="varying"), weights)
        d_weights, d_x_BTI = jax.grad(loss, (0, 1))(weights, x_BTI)
        return jax.lax.psum(d_weights, "fsdp") if is_gathered else d_weights, d_x_BTI

    P = PartitionSpec
    spread = jax.jit(shard_map_over_batch(of_rows, mesh, (P(), P("fsdp")), (P(), P("fsdp"))))
    monkeypatch.setattr(hardware, "platform_of", lambda _: "tpu")
    with hardware.compiling_for(mesh):
        program = spread.lower(weights, x_BTI)
    assert (
        bool(re.search(r"sharding_constraint .*\[\{\}, \{\}, \{\}\]> : tensor<2x128x16xf32>", program.as_text()))
        != shards_inputs
    )
    found = program.compile()(weights, x_BTI)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(jax.grad(loss, (0, 1))(weights, x_BTI)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 7])
@pytest.mark.slow
def test_log_probabilities_do_not_depend_on_the_last_token_being_read(max_tokens):
    batch = tiny.random_batch(num_prompts=2, group_size=2, max_tokens=max_tokens)
    params = tiny.random_params(DEEP)

    @functools.partial(jax.jit, static_argnums=0)
    def logprobs(model):
        return policy_logprobs(model, params, batch.rollout, Sampling(), 0)

    mask_PGT = batch.rollout.mask_PGT > 0
    for here, there in zip(logprobs(ModelDef(DEEP)), logprobs(ModelDef(DEEP, hardware=GPU)), strict=True):
        np.testing.assert_allclose(np.where(mask_PGT, here, 0), np.where(mask_PGT, there, 0), atol=1e-5)
    assert mask_PGT.any()


@pytest.mark.slow
def test_gradients_leave_the_layers_in_the_dtype_of_their_products():
    """Matrices are cast before the loop over layers or in it: gradients differ by one rounding, and have the weights' type.

    XLA may leave the rounding out where it sees the cast back to float32 behind it, as in the loop.
    """
    params = tiny.random_params(DEEP)
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(1, tiny.VOCAB, (4, 9)))

    def run(**changes):
        model = ModelDef(DEEP, dtype="bfloat16", remat="dots", **changes)

        def summed(params):
            return (model.bind(params)(tokens_BT, tokens_BT > 0).astype(jnp.float32) ** 2).sum()

        return jax.jit(jax.value_and_grad(summed))(params)

    (value, grads), (expected, expected_grads) = run(hardware=GPU), run()
    assert value == expected
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert tiny.largest_difference(grads, expected_grads) < 2**-8
