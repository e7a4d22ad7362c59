"""What cannot fit is refused with the sizes, before it is made."""

import pytest

from grpo_jax.errors import UserError
from grpo_jax.training import memory
from grpo_jax.training.memory import batch_bytes, bytes_on_a_device, require_memory, require_memory_together
from grpo_jax.training.run import make_run
from tests import tiny


@pytest.fixture(scope="module")
def run():
    return make_run(tiny.config_of("grpo", {"mesh.data": 2, "mesh.fsdp": 2, "mesh.fsdp_min_elements": 0}))


@pytest.mark.parametrize(
    ("share", "words"), [(1e9, ""), (0.99, "config.model: weights"), (1.0001, "config.rollout: a batch of 4 x")]
)
def test_state_and_batch_must_fit(run, monkeypatch, share, words):
    limit = share * bytes_on_a_device(run.abstract_state)
    monkeypatch.setattr(memory, "memory_of_a_device", lambda run: limit)
    if not words:
        require_memory(run)
        return
    with pytest.raises(UserError, match=words):
        require_memory(run)


def test_several_runs_of_one_call_must_fit_together(monkeypatch):
    """A base that all read counts once."""
    run = make_run(tiny.config_of("grpo", {"mesh.data": 1, "lora.rank": 2}))
    base, state = (bytes_on_a_device(tree) for tree in (run.abstract_state.base, run.abstract_state))
    each = state + batch_bytes(run)
    for fns, limit in ((run.vmapped(), 3.5 * each), (run.vmapped(shares_base=True), 3.5 * (each - base) + base)):
        monkeypatch.setattr(memory, "memory_of_a_device", lambda run, limit=limit: limit)
        require_memory_together(fns, 3)
        with pytest.raises(UserError, match=r"config.cohort_size: 4 runs in one call take .*; use 3$"):
            require_memory_together(fns, 4)
    monkeypatch.setattr(memory, "memory_of_a_device", lambda run: 1.5 * each)
    with pytest.raises(UserError, match="use 1, which"):
        require_memory_together(run.vmapped(), 4)


def test_shards_are_counted_and_not_the_whole(run):
    whole = make_run(tiny.config_of("grpo", {"mesh.data": 1}))
    assert 0.4 < bytes_on_a_device(run.abstract_state) / bytes_on_a_device(whole.abstract_state) < 0.6
