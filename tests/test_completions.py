"""Records of what was sampled: pieces of text that add up, numbers that belong to their token."""

import numpy as np
import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models

from grpo_jax import objectives
from grpo_jax.learner.advantage_diagnostics import advantages_with_grpo
from grpo_jax.tasks.tokenizers import CharTokenizer, HFTokenizer
from grpo_jax.training.completions import completion_rows, text_pieces
from tests import tiny
from tests.test_tasks_host import save_hf_tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "bytes"
    return HFTokenizer(save_hf_tokenizer(folder, {}, eos_token="<eos>", pad_token="<pad>"))


@pytest.mark.parametrize("text", ["x = 3\n", "naïve 数学 🙂👩‍👩‍👧 e\u0301", " \t\n ", "<eos> is a word", "\x00\ufffd", ""])
def test_pieces_of_characters_cut_into_bytes_add_up(byte_level, text):
    ids = [*byte_level.encode(text), *byte_level.eos_ids]
    pieces = text_pieces(byte_level, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == byte_level.decode(ids)
    if "<" not in text and "\ufffd" not in text:  # a piece is a whole character, so it stands alone
        assert [piece for piece in pieces if piece] == list(text)


def test_pieces_of_rubbish_bytes_add_up(byte_level):
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = rng.integers(0, byte_level.vocab_size, 30)
        assert "".join(text_pieces(byte_level, ids)) == byte_level.decode(ids)


def test_pieces_keep_a_space_that_the_first_token_of_a_text_loses():
    vocab = {"▁the": 0, "▁cat": 1, "s": 2, "▁": 3}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.decoder = decoders.Metaspace()

    class Metaspace:
        def decode(self, ids):
            return raw.decode(ids)

    assert text_pieces(Metaspace(), [0, 1, 2, 3, 0]) == ["the", " cat", "s", " ", " the"]


@pytest.mark.slow
def test_a_row_holds_its_own_tokens_numbers():
    obj, batch = objectives.get("gtpo"), tiny.random_batch(num_prompts=4, group_size=3, max_tokens=5)
    batch = tiny.with_rollout(batch, mask_PGT=batch.rollout.mask_PGT.at[1, 2].set(0))
    adv_PGT, grpo_PG = advantages_with_grpo(obj, batch, filter_truncated=False)
    tokenizer = CharTokenizer("abcdefghijklmnopqrstu")
    rows = completion_rows(batch, adv_PGT, grpo_PG, tokenizer, num_groups=2)
    places = [(p, g) for p in range(2) for g in range(3) if (p, g) != (1, 2)]  # a dropped row has no record
    assert len(rows) == len(places)
    for row, (p, g) in zip(rows, places, strict=True):
        num = int(batch.rollout.mask_PGT[p, g].sum())
        assert (row["group"], row["tokens"]) == (p, num)
        assert "".join(row["token_text"]) == row["completion"] == tokenizer.decode(batch.rollout.tokens_PGT[p, g, :num])
        np.testing.assert_allclose(row["token_advantage"], adv_PGT[p, g, :num], rtol=1e-3)
        np.testing.assert_allclose(row["token_entropy"], batch.rollout.entropy_PGT[p, g, :num], rtol=1e-3)
        np.testing.assert_allclose(row["entropy"], np.mean(batch.rollout.entropy_PGT[p, g, :num]), rtol=1e-3)
        np.testing.assert_allclose(row["grpo_advantage"], grpo_PG[p, g], rtol=1e-3)
        assert all(len(repr(abs(x))) <= 9 for x in row["token_advantage"])
    assert {row["task_reward"] for row in rows} == {0.0, 1.0}
