"""Compiled programs are kept between processes where that is safe, and where the user says."""

import pathlib

import jax
import pytest

from grpo_jax import caches


@pytest.fixture
def kept_in(monkeypatch):
    """-> a call that says where programs are kept; afterwards it is as before."""
    before = jax.config.jax_compilation_cache_dir
    yield lambda: pathlib.Path(jax.config.jax_compilation_cache_dir)
    jax.config.update("jax_compilation_cache_dir", before)


def test_an_accelerators_programs_are_kept_for_the_next_run(kept_in, tmp_path, monkeypatch):
    monkeypatch.setenv("GRPO_JAX_CACHE", str(tmp_path))
    before = kept_in()
    caches.enable_compilation_cache_on_accelerators()
    assert kept_in() == before, "a CPU's programs may not run on the next CPU"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    caches.enable_compilation_cache_on_accelerators()
    assert kept_in() == tmp_path / "compiled"


def test_the_user_has_the_last_word(kept_in, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    before = kept_in()
    caches.enable_compilation_cache(tmp_path / "ours")
    assert kept_in() == before  # JAX has read the variable itself
