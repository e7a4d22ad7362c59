"""What cannot fit is refused with the sizes, before it is made."""

import pytest

from grpo_jax.errors import UserError
from grpo_jax.training import memory
from grpo_jax.training.memory import bytes_on_a_device, require_memory
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


def test_shards_are_counted_and_not_the_whole(run):
    whole = make_run(tiny.config_of("grpo", {"mesh.data": 1}))
    assert 0.4 < bytes_on_a_device(run.abstract_state) / bytes_on_a_device(whole.abstract_state) < 0.6
