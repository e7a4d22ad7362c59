"""Gradients that are added to sums that are there already, in place: of a scan over layers, and of embedding and head.

Left to JAX, the backward pass of a scan makes new stacks of all layers' gradients: it fills them with zeros, writes each
layer's slice, and then all of it is read again to be added up over microbatches. That is a second copy of the gradients, which
in float32 are the largest thing beside the optimizer, and three passes over it where one does. It is the same with a table of
which a microbatch reads a few thousand rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

Step = Callable[[Any, Any, Any], tuple[Any, Any]]  # (x, one layer's weights, its kind) -> (x, what to keep, without gradient)


class _Saved(NamedTuple):
    """Kept from the forward pass. made_L: by layers, stacked. given: what all of them had. sums: as they came."""

    made_L: Sequence[jax.Array]
    given: Sequence[Any]
    weights_L: Any
    sums_L: Any


def scan_layers(step: Step, x: Any, weights_L: Any, kinds_L: Any, sums_L: Any) -> tuple[Any, Any]:
    """Do jax.lax.scan of step(x, weights, kind) over layers, of which the gradient is special.

    Args:
      x: of the first layer. weights_L, kinds_L: stacked trees. sums_L: like weights_L, sums of gradients so far.
    Returns: (x behind the last layer, what the layers keep, stacked). The gradient by `sums_L` is defined as sums_L plus the
      gradient by `weights_L`, and that by `weights_L` as none. Of what is kept there is no gradient.
    """
    layer = _Layer(step, x, weights_L, kinds_L)

    @jax.custom_vjp
    def run(x: Any, weights_L: Any, sums_L: Any) -> tuple[Any, Any]:
        del sums_L
        return jax.lax.scan(lambda x, given: step(x, *given), x, (weights_L, kinds_L))

    def forward(x: Any, weights_L: Any, sums_L: Any) -> tuple[tuple[Any, Any], _Saved]:
        x, (kept_L, made_L) = jax.lax.scan(lambda x, given: layer.forward(x, *given), x, (weights_L, kinds_L))
        return (x, kept_L), _Saved(made_L, layer.given, weights_L, sums_L)

    def backward(saved: _Saved, d_results: tuple[Any, Any]) -> tuple[Any, None, Any]:
        def back(carry: tuple[Any, Any], of_layer: Any) -> tuple[tuple[Any, Any], None]:
            d_x, sums_L = carry
            i, weights, made = of_layer
            d_weights, d_x = layer.pull_back(weights, made, saved.given)(d_x)
            sums_L = jax.tree.map(lambda sum_L, d: sum_L.at[i].add(d.astype(sum_L.dtype)), sums_L, d_weights)
            return (d_x, sums_L), None

        num_layers = len(jax.tree.leaves(saved.weights_L)[0])
        layers = jnp.arange(num_layers), saved.weights_L, saved.made_L
        (d_x, sums_L), _ = jax.lax.scan(back, (d_results[0], saved.sums_L), layers, reverse=True)
        return d_x, None, sums_L

    run.defvjp(forward, backward)
    return run(x, weights_L, sums_L)


class _Layer:
    """One layer's two passes, traced once to see which of the numbers that the backward pass reads the layer has made itself.

    The others are its weights, which are there anyway, and what all layers are given: to stack these would be a copy a layer.
    """

    def __init__(self, step: Step, x: Any, weights_L: Any, kinds_L: Any):
        trees: list[Any] = []

        def both(x: Any, weights: Any, kind: Any) -> list[Any]:
            x, pull_back, kept = jax.vjp(lambda weights, x: step(x, weights, kind), weights, x, has_aux=True)
            read, tree = jax.tree.flatten(pull_back)
            trees[:] = [tree, jax.tree.structure((x, kept))]
            return [*jax.tree.leaves((x, kept)), *read]

        first = jax.tree.map(lambda stack: stack[0], (weights_L, kinds_L))
        traced = jax.make_jaxpr(both)(x, *first)
        self._run, self._constvars, self.given = jaxpr_as_fun(traced), traced.jaxpr.constvars, traced.consts
        self._pull_back, self._results = trees
        num_x, num_weights = len(jax.tree.leaves(x)), len(jax.tree.leaves(weights_L))
        self._weights = traced.jaxpr.invars[num_x : num_x + num_weights]
        self._read = traced.jaxpr.outvars[self._results.num_leaves :]

    def forward(self, x: Any, weights: Any, kind: Any) -> tuple[Any, tuple[Any, list[jax.Array]]]:
        """Run the layer; -> (x, (what it keeps, what it made for the backward pass))."""
        leaves = jax.tree.leaves((x, weights, kind))
        results = self._run(*leaves)
        x, kept = jax.tree.unflatten(self._results, results[: self._results.num_leaves])
        read = results[self._results.num_leaves :]
        return x, (kept, [value for value, var in zip(read, self._read, strict=True) if self._is_made(var)])

    def pull_back(self, weights: Any, made: Sequence[jax.Array], given: Sequence[Any]) -> Callable[[Any], tuple[Any, Any]]:
        """Return the derivative d_x -> (d_weights, d_x), from what `forward` made and what is there anyway."""
        known = dict(zip((*self._weights, *self._constvars), (*jax.tree.leaves(weights), *given), strict=True))
        rest = iter(made)
        read = [next(rest) if self._is_made(var) else _value_of(var, known) for var in self._read]
        return jax.tree.unflatten(self._pull_back, read)

    def _is_made(self, var: Any) -> bool:
        return not hasattr(var, "val") and var not in self._weights and var not in self._constvars


def _value_of(var: Any, known: dict[Any, Any]) -> Any:
    """Return the value of a literal, or of a variable that is known."""
    return var.val if hasattr(var, "val") else known[var]


# ------------------------------------------------------------------------------------------------------------------- tables

Find = Callable[[Any, Any], Any]  # (table, tokens) -> rows
AddRows = Callable[[Any, Any, Any], Any]  # (sum of gradients, tokens, the rows' gradient) -> the sum with it


class TableSums:
    """Sums of the gradients of embedding and head, by name, for one pass of a model.

    What reads a table is given the sum and hands it on; backward it is given the sum and adds to it. So the sum is one array,
    of whatever reads the table, and the gradient by it is defined as that array.
    """

    def __init__(self, sums: dict[str, Any]):
        self._sums = dict(sums)

    def look_up(self, name: str, find: Find, add_rows: AddRows, table: Any, tokens: Any) -> Any:
        """Return find(table, tokens); its gradient goes to the table's sum if there is one."""
        if name not in self._sums:
            return find(table, tokens)
        found = _look_up(find, add_rows, table, tokens, self._sums[name])
        rows, self._sums[name] = found  # pyright: ignore[reportGeneralTypeIssues]
        return rows

    def take(self, name: str, shape: tuple[int, ...]) -> Any:
        """Return the table's sum to its last reader, whose gradient by it is the sum with its own.

        None: there is none, or the reader's table has another shape, as one that is gathered has.
        """
        return self._sums.pop(name) if name in self._sums and self._sums[name].shape == shape else None

    def close(self, x: Any) -> Any:
        """Return x, something that everything before depends on; the sums that no reader took end here."""
        return _close(x, self._sums) if self._sums else x


NO_SUMS = TableSums({})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _look_up(find: Find, add_rows: AddRows, table: Any, tokens: Any, total: Any) -> tuple[Any, Any]:
    del add_rows
    return find(table, tokens), total


def _look_up_forward(find: Find, add_rows: AddRows, table: Any, tokens: Any, total: Any) -> tuple[tuple[Any, Any], Any]:
    return _look_up(find, add_rows, table, tokens, total), tokens


def _look_up_backward(find: Find, add_rows: AddRows, tokens: Any, d_results: tuple[Any, Any]) -> tuple[None, None, Any]:
    del find
    d_rows, total = d_results
    return None, None, add_rows(total, tokens, d_rows)


_look_up.defvjp(_look_up_forward, _look_up_backward)


@jax.custom_vjp
def _close(x: Any, sums: dict[str, Any]) -> Any:
    del sums
    return x


_close.defvjp(lambda x, sums: (x, sums), lambda sums, d_x: (d_x, sums))
