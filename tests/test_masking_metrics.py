"""Masks and masked statistics against numpy.ma; metrics that do not notice how a batch was cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from grpo_jax import metrics as metrics_lib
from grpo_jax.masking import masked_mean, masked_std, masked_sum
from grpo_jax.metrics import Correlation, Max, Mean
from tests import tiny

AXES = (None, 0, -1, (0, 2))


def ragged(shape=(4, 3, 5), seed=0):
    """(values that are NaN or huge where masked, mask): one row with everything masked, one with a single value."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < 0.6
    mask[0, 0] = False
    mask[0, 1] = np.arange(shape[-1]) == 2
    mask[:, 2, 0] = False
    x = rng.normal(size=shape) + 3.0
    hidden = rng.choice([np.nan, np.inf, -1e30], shape)
    return np.where(mask, x, hidden).astype(np.float32), mask


# -------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("keepdims", [False, True])
def test_masked_sum_and_mean_are_numpys(axis, keepdims):
    x, mask = ragged()
    reference = np.ma.MaskedArray(np.where(mask, x, 0).astype(np.float64), ~mask)
    total = masked_sum(x, mask, axis, keepdims=keepdims)
    mean = masked_mean(x, mask, axis, keepdims=keepdims)
    np.testing.assert_allclose(total, np.ma.filled(reference.sum(axis, keepdims=keepdims), 0.0), rtol=1e-5)
    np.testing.assert_allclose(mean, np.ma.filled(reference.mean(axis, keepdims=keepdims), 0.0), rtol=1e-5)
    assert total.shape == mean.shape == mask.any(axis, keepdims=keepdims).shape


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("ddof", [0, 1])
def test_masked_std_is_numpys(axis, ddof):
    x, mask = ragged()
    count = mask.sum(axis)
    reference = np.ma.MaskedArray(np.where(mask, x, 0).astype(np.float64), ~mask)
    expected = np.where(count > ddof, np.ma.filled(reference.std(axis, ddof=0), 0.0), 0.0)
    expected = expected * np.sqrt(count / np.maximum(count - ddof, 1))  # numpy.ma warns where count <= ddof
    std = masked_std(x, mask, axis, ddof=ddof)
    np.testing.assert_allclose(std, expected, rtol=1e-5, atol=1e-6)
    assert np.shape(std) == count.shape and (np.asarray(std) > 0).any()


def test_std_of_few_values():
    x = jnp.array([[3.0, 9.0, 5.0], [3.0, 9.0, 5.0], [3.0, 9.0, 5.0]])
    mask = jnp.array([[0, 0, 0], [1, 0, 0], [1, 0, 1]])
    np.testing.assert_allclose(masked_std(x, mask, -1), [0, 0, np.sqrt(2)], rtol=1e-6)
    np.testing.assert_allclose(masked_std(x, mask, -1, ddof=0), [0, 0, 1], rtol=1e-6)


def test_std_survives_a_large_offset():
    """Two passes: the mean of squares minus the squared mean would lose all digits here."""
    x = jnp.array([10_000.0, 10_001.0, 10_002.0])
    np.testing.assert_allclose(masked_std(x, jnp.ones(3)), 1.0, rtol=1e-4)


def test_all_masked_is_zero_not_nan():
    x = jnp.full((2, 3), jnp.nan)
    for statistic in (masked_sum, masked_mean, masked_std):
        np.testing.assert_array_equal(statistic(x, jnp.zeros((2, 3)), -1), [0.0, 0.0])


def test_gradient_ignores_what_is_masked():
    x, mask = ragged()
    grad = jax.grad(lambda x: masked_mean(x, mask))(x)
    np.testing.assert_allclose(grad, mask / mask.sum(), rtol=1e-6)


@pytest.mark.parametrize("num_devices", [2, 8])
def test_statistics_over_a_mesh_axis_are_those_of_the_whole(num_devices):
    x, mask = ragged((8, 3, 5), seed=1)
    rows = PartitionSpec("data")

    def local(x, mask):
        return masked_mean(x, mask, axis_name="data"), masked_std(x, mask, axis_name="data")

    sharded = jax.shard_map(local, mesh=tiny.mesh_of(num_devices), in_specs=(rows, rows), out_specs=PartitionSpec())
    mean, std = jax.jit(sharded)(x, mask)
    np.testing.assert_allclose(mean, x[mask].mean(), rtol=1e-6)
    np.testing.assert_allclose(std, x[mask].std(ddof=1), rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ metrics


def metrics_of(values, weights):
    return {
        "mean": Mean.of(values, weights),
        "plain": Mean.of(values),
        "max": Max(values.max()),
        "correlation": Correlation.of(values + 100.0, partner_of(values), weights),
    }


def partner_of(values):
    """Something that goes along with the values, but not in a straight line."""
    return jnp.sin(values) - 50.0


def correlation(x, y, weights):
    covariance = np.cov(np.ravel(x).astype(np.float64), np.ravel(y).astype(np.float64), aweights=np.ravel(weights))
    return covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])


def whole_and_parts(num_parts=4):
    """Parts of unequal weight, so that a mean of means would be another number."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(8, 6)).astype(np.float32) + np.arange(8, dtype=np.float32)[:, None]
    weights = (np.arange(6)[None] < np.array([6, 1, 5, 2, 0, 0, 6, 3])[:, None]).astype(np.float32)
    values, weights = jnp.asarray(values), jnp.asarray(weights)
    parts = [metrics_of(v, w) for v, w in zip(jnp.split(values, num_parts), jnp.split(weights, num_parts), strict=True)]
    expected = {
        "mean": np.average(values, weights=weights),
        "plain": values.mean(),
        "max": values.max(),
        "correlation": correlation(values, partner_of(values), weights),
    }
    means = [float(part["mean"].value()) for part in parts]
    assert abs(np.mean(means) - expected["mean"]) > 0.1
    return metrics_of(values, weights), parts, expected


def assert_values(metrics, expected):
    values = metrics_lib.to_floats(metrics)
    assert list(values) == sorted(expected)
    # The offset of 100 alone rounds the correlation's values by 4e-6; in which direction, depends on the order of sums.
    np.testing.assert_allclose([values[name] for name in expected], list(expected.values()), rtol=5e-6, atol=5e-6)


def test_merged_parts_have_the_value_of_the_whole():
    whole, parts, expected = whole_and_parts()
    assert_values(whole, expected)
    assert_values(functools.reduce(metrics_lib.merge, parts), expected)
    assert_values(functools.reduce(metrics_lib.merge, parts[::-1]), expected)


def test_stacked_parts_have_the_value_of_the_whole():
    _, parts, expected = whole_and_parts()
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    assert_values(metrics_lib.reduce_stacked(stacked), expected)


def test_devices_have_the_value_of_the_whole():
    _, parts, expected = whole_and_parts()
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)

    def reduce(one):
        return metrics_lib.psum(jax.tree.map(lambda x: x[0], one), "data")

    sharded = jax.shard_map(reduce, mesh=tiny.mesh_of(4), in_specs=PartitionSpec("data"), out_specs=PartitionSpec())
    assert_values(jax.jit(sharded)(stacked), expected)


def test_merge_keeps_names_that_only_one_side_has():
    left, right = {"a": Mean.of(jnp.array([1.0, 2.0]))}, {"b": Max(jnp.float32(-3.0)), "a": Mean.of(jnp.array([6.0]))}
    assert metrics_lib.to_floats(metrics_lib.merge(left, right)) == {"a": 3.0, "b": -3.0}


def test_a_mean_of_nothing_is_zero_and_unweighted_values_may_be_nan():
    values = jnp.array([jnp.nan, 2.0, jnp.inf])
    assert float(Mean.of(values, jnp.array([0.0, 1.0, 0.0])).value()) == 2.0
    assert float(Mean.of(values, jnp.zeros(3)).value()) == 0.0


def test_max_of_negative_values_is_negative():
    assert float(Max(jnp.float32(-2.0)).merge(Max(jnp.float32(-1.0))).value()) == -1.0


def test_correlation_without_spread_is_zero_and_unweighted_pairs_may_be_nan():
    x, constant = jnp.array([1.0, 2.0, jnp.nan, 4.0]), jnp.full(4, 0.3)
    weight = jnp.array([1.0, 1.0, 0.0, 1.0])
    assert float(Correlation.of(x, constant, weight).value()) == float(Correlation.of(constant, x, weight).value()) == 0.0
    assert float(Correlation.of(x, x, jnp.zeros(4)).value()) == 0.0
    assert float(Correlation.of(x, -x, weight).value()) == pytest.approx(-1.0, abs=1e-6)
    one_and_none = Correlation.of(x, x, weight).merge(Correlation.of(x, x, jnp.zeros(4)))
    assert float(one_and_none.value()) == pytest.approx(1.0, abs=1e-6)


def test_correlation_survives_a_large_offset():
    """Sums of squares would lose all digits here."""
    x = np.arange(16, dtype=np.float32)
    y = np.where(x % 3 == 0, -x, x).astype(np.float32)
    got = Correlation.of(jnp.asarray(x + 10_000), jnp.asarray(y), jnp.ones(16)).value()
    assert float(got) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-4)
