"""Eight simulated CPU devices, strict shapes, compiled programs that all tests share, and the tiers and order of the tests.

GRPO_JAX_TESTS_PLATFORM=cuda or tpu: on the chip that is here (`make test-gpu`, `make test-tpu`), in full float32; programs of
several devices stay out.
"""

import os
import tempfile

from tests.programs import PLATFORM, XLA_FLAGS

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}"
os.environ["JAX_PLATFORMS"] = PLATFORM

import jax
import pytest
from jaxtyping import install_import_hook

# The annotated shapes of public functions are checked at every call.
install_import_hook("grpo_jax.objectives", "beartype.beartype")
jax.config.update("jax_numpy_rank_promotion", "raise")
if PLATFORM != "cpu":
    jax.config.update("jax_default_matmul_precision", "highest")  # or a product of float32 has ten bits

# Programs that several tests compile are compiled once, by whichever of pytest-xdist's processes comes first.
if "GRPO_JAX_TESTS_COMPILED" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="grpo_jax_compiled_")
    os.environ["GRPO_JAX_TESTS_COMPILED"] = _compiled.name  # the processes started from here see it
jax.config.update("jax_compilation_cache_dir", os.environ["GRPO_JAX_TESTS_COMPILED"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Files of a minute or more, the longest first, then all others by name: two processes that take file after file end together.
LONGEST_FIRST = (
    "test_hosts",
    "test_resume",
    "test_colab",
    "test_objectives",
    "test_train_step",
    "test_learning",
    "test_host_training",
    "test_contributing",
    "test_sweep",
    "test_transformer",
    "test_lora",
    "test_rollout",
    "test_mesh",
    "test_widths",
    "test_beyond",
    "test_shared_program",
    "test_plan",
)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items):
    """Mark as fast what has no other tier, and put the files in order."""
    for item in items:
        if not (item.get_closest_marker("slow") or item.get_closest_marker("nightly")):
            item.add_marker(pytest.mark.fast)
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))  # stable: within a file nothing moves
