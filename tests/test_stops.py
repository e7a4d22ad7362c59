"""Stop strings: the automaton against a scan of the text, texts of tokens against decoding, and rollouts that end by them."""

import logging
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from grpo_jax.errors import UserError
from grpo_jax.rollout.stops import cut_at_stop, stop_strings
from grpo_jax.tasks.tokenizers import CharTokenizer, HFTokenizer, end_of_turn, token_texts
from grpo_jax.training.samplers import end_tokens
from tests import tiny
from tests.test_rollout import ALL, STOPS, G, P, T, sampled, spec_of
from tests.test_tasks_host import save_hf_tokenizer, task_of

# ------------------------------------------------------------------------------------------------------- the automaton


def first_end(strings, texts):
    """Index of the token that completes the first occurrence of any string, by a scan of the whole text; None without one."""
    text = b""
    for t, part in enumerate(texts):
        text += part
        if any(string in text for string in strings):
            return t
    return None


def found_end(automaton, token_T):
    state_1 = jnp.zeros(1, jnp.int32)
    for t, token in enumerate(token_T):
        state_1 = automaton.advance(state_1, jnp.asarray([token]))
        if int(state_1[0]) == automaton.end:
            return t
    return None


@pytest.mark.parametrize("seed", range(6))
def test_the_automaton_stops_where_a_scan_of_the_text_does(seed):
    """Random strings that overlap themselves and others, over random tokens of one to four bytes, halves of characters too."""
    rng = random.Random(seed)
    alphabet = ["ab", "aé", "ab\n", "é語"][seed % 4]
    some_text = lambda longest: "".join(rng.choice(alphabet) for _ in range(rng.randint(1, longest)))  # noqa: E731
    strings = [some_text(6) for _ in range(rng.randint(1, 4))]
    joined = "".join(some_text(50) for _ in range(9)).encode()
    pieces = [joined[i : i + rng.randint(1, 4)] for i in (rng.randrange(len(joined)) for _ in range(30))]
    texts = [b"", *(alphabet[i % len(alphabet)].encode() for i in range(3)), *pieces]
    automaton = stop_strings(strings, texts)
    encoded = [string.encode() for string in strings]
    rows, length = 300, 14
    token_BT = np.array([[rng.randrange(len(texts)) for _ in range(length)] for _ in range(rows)])
    step = jax.jit(automaton.advance)
    state_B, ends_B = jnp.zeros(rows, jnp.int32), np.full(rows, -1)
    for t in range(length):
        state_B = step(state_B, jnp.asarray(token_BT[:, t]))
        ends_B = np.where((ends_B < 0) & (np.asarray(state_B) == automaton.end), t, ends_B)
    expected = [first_end(encoded, [texts[i] for i in token_T]) for token_T in token_BT]
    np.testing.assert_array_equal(ends_B, [-1 if t is None else t for t in expected])
    assert len(set(expected)) > 2  # found early, found late, not found


def test_spans_middles_overlaps_and_ids_beyond_the_tokenizer():
    texts = [b"", b"a", b"ab", b"aab", b"b\n\nQ", b"\n", b"xx\n\nQ: y", b"Q:", b"Q"]
    automaton = stop_strings(["\n\nQ:", "aaab"], texts)
    for tokens, end in [
        ([6], 0),  # begins and ends within one token
        ([5, 5, 5, 7], 3),  # spans three, and begins at the second newline
        ([4, 1, 5, 0, 5, 99, 7], 6),  # tokens without text in between; 99 has none
        ([1, 1, 2], 2),  # aa + ab: the string overlaps itself
        ([1, 1, 1, 1, 2], 4),
        ([3, 3, 1, 1], None),
        ([5, 5, 8], None),
    ]:
        assert found_end(automaton, tokens) == end


def test_tokens_that_move_alike_share_a_column_and_equal_automata_are_equal():
    texts = [bytes([i]) * n for n in range(1, 4) for i in range(256)]
    automaton = stop_strings(["stop"], texts)
    assert automaton.table.shape == (5, 6)  # s, t, o, p, several of them or any other byte, nothing
    assert automaton.table.dtype == automaton.class_V.dtype == np.uint8 and len(automaton.class_V) == 768
    again, other = stop_strings(["stop"], texts), stop_strings(["step"], texts)
    assert again == automaton and hash(again) == hash(automaton) and other != automaton


@pytest.mark.parametrize(
    ("strings", "text", "kept"),
    [
        (("Q:",), "4\nQ: 5", "4\n"),
        (("bc", "abcd"), "xabcd", "xa"),  # the one that ends first, though the other begins before it
        (("bc", "abc"), "xabc", "x"),  # of those that end together the longest
        (("Q:", "7"), "12", "12"),
        ((), "Q:", "Q:"),
    ],
)
def test_the_text_is_cut_before_the_stop_that_ends_first(strings, text, kept):
    assert cut_at_stop(text, strings) == kept


# ------------------------------------------------------------------------------------------------------ texts of tokens


def save_metaspace_tokenizer(folder):
    """A sentencepiece-style tokenizer: spaces are a character of their own, unknown characters are single bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁a", "▁ab", "\n"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab")]
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens([AddedToken("</s>", special=True)])
    folder.mkdir()
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}')
    return str(folder)


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "characters"])
def test_texts_of_tokens_join_to_what_is_decoded(kind, tmp_path):
    make = {
        "byte-level": lambda: HFTokenizer(save_hf_tokenizer(tmp_path / "model", {"config.json": 2})),
        "metaspace": lambda: HFTokenizer(save_metaspace_tokenizer(tmp_path / "model")),
        "characters": lambda: CharTokenizer("0123456789+= "),
    }
    tokenizer = make[kind]()
    texts = token_texts(tokenizer)
    assert len(texts) == tokenizer.vocab_size
    samples = {"characters": ["12 + 3 = 15"]}.get(kind, ["ab a  b\nab", "naïve 語 ab", "🙂 a", "\t¡x"])
    for text in samples:
        ids = tokenizer.encode(text)
        assert b"".join(texts[i] for i in ids).decode() == text == tokenizer.decode(ids)


def test_a_tokenizer_whose_tokens_have_no_text_of_their_own_is_refused(tmp_path):
    folder = tmp_path / "words"
    folder.mkdir()
    raw = RawTokenizer(models.WordLevel({"<eos>": 0, "yes": 1, "no": 2}, unk_token="<eos>"))
    raw.decoder = decoders.WordPiece()
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}')
    with pytest.raises(UserError, match=r"config\.rollout\.stop: .* \(decoder: WordPiece\); use config\.rollout\.stop_ids"):
        token_texts(HFTokenizer(str(folder)))


# ------------------------------------------------------------------------------------------------------------- rollouts

TEXTS = [b"", *(bytes([97 + i % 3]) * (1 + i % 2) for i in range(tiny.VOCAB - 1))]  # a, bb, c, aa, b, cc, ...
STRINGS = ["abb", "cc", "bbbbb"]


@pytest.mark.parametrize("max_live_sequences", [0, 5])
@pytest.mark.slow
def test_tokens_with_and_without_a_stop_string_agree_up_to_it(max_live_sequences):
    free = sampled(spec_of())
    got = sampled(spec_of(stop_strings=stop_strings(STRINGS, TEXTS), max_live_sequences=max_live_sequences))
    encoded, num_cut = [string.encode() for string in STRINGS], 0
    for p, g in np.ndindex(P, G):
        num_free = int(free.mask_PGT[p, g].sum())
        end = first_end(encoded, [TEXTS[i] for i in free.tokens_PGT[p, g, :num_free]])
        num = num_free if end is None else end + 1
        np.testing.assert_array_equal(got.mask_PGT[p, g], np.arange(T) < num)
        np.testing.assert_array_equal(got.tokens_PGT[p, g, :num], free.tokens_PGT[p, g, :num])
        np.testing.assert_allclose(got.sampler_logp_PGT[p, g, :num], free.sampler_logp_PGT[p, g, :num], atol=1e-6)
        assert got.is_truncated_PG[p, g] == (end is None and free.is_truncated_PG[p, g])
        num_cut += num < num_free
    assert 5 < num_cut < P * G


@pytest.mark.slow
def test_all_ends_and_the_penalty_together_refilled_or_side_by_side():
    spec = dict(sampling=ALL, stop_strings=stop_strings(STRINGS, TEXTS), stop_ids=STOPS)
    side_by_side, refilled = sampled(spec_of(**spec)), sampled(spec_of(**spec, max_live_sequences=4))
    np.testing.assert_array_equal(side_by_side.tokens_PGT, refilled.tokens_PGT)
    np.testing.assert_array_equal(side_by_side.is_truncated_PG, refilled.is_truncated_PG)


# --------------------------------------------------------------------------------------------------------------- tasks


def rows_of(path):
    path.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=", "answer": "3"}\n')
    return {"task__jsonl__path": str(path), "reward__task": "exact"}


def test_a_stop_is_no_part_of_what_is_judged(tmp_path):
    """Neither a text nor a token; the tokens themselves stay, for they are trained on."""
    tokenizer = CharTokenizer("0123456789+=\nQ")
    stop_id = tokenizer.encode("=")[0]
    task = task_of(tokenizer, **rows_of(tmp_path / "rows.jsonl"), rollout__stop=("\nQ",), rollout__stop_ids=(stop_id,))
    try:
        assert task.stop_ids == (1, stop_id)
        texts = ["2\nQ", "2=", "2", "2\n1", "23"]
        ids = [tokenizer.encode(text) for text in texts]
        width = max(map(len, ids))
        tokens_PGT = np.array([[row + [0] * (width - len(row)) for row in ids]])
        mask_PGT = np.array([[[1] * len(row) + [0] * (width - len(row)) for row in ids]])
        np.testing.assert_array_equal(
            task.reward(np.zeros(1, int), tokens_PGT, mask_PGT).task_PG,
            [[float(text in ("2", "2=", "2\nQ")) for text in texts]],
        )
        ends = end_tokens(task)
        assert ends.stop_strings is not None and found_end(ends.stop_strings, tokenizer.encode("2\n\nQ4")) == 3
        assert end_tokens(task) == ends
    finally:
        task.close()


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml_tokenizer(folder, template):
    """Of a base model: its only end token is that of a document."""
    return HFTokenizer(save_hf_tokenizer(folder, {"config.json": 1}, chat_template=template))


def test_what_the_template_writes_behind_an_assistants_turn_is_a_stop(tmp_path, caplog):
    tokenizer = chatml_tokenizer(tmp_path / "model", CHATML)
    turn = tokenizer.encode("<|im_end|>")[0]
    assert end_of_turn(tokenizer) == (turn, "<|im_end|>") and turn not in tokenizer.eos_ids
    rows = rows_of(tmp_path / "rows.jsonl")
    with caplog.at_level(logging.WARNING):
        task = task_of(tokenizer, **rows, use_chat_template=True)
    task.close()
    assert task.stop_ids == (1, turn)
    assert f"token {turn}, <|im_end|>, ends a completion" in caplog.text
    plain = task_of(tokenizer, **rows)
    plain.close()
    assert plain.stop_ids == (1,)  # plain text has no turns


@pytest.mark.parametrize(
    "template",
    [
        "",  # none at all
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",  # words behind the turn
        "{{ messages[0]['content'] }}",  # the assistant's turn is not shown
        "{{ raise_exception('only one message') }}",
    ],
)
def test_a_template_without_a_mark_behind_the_turn_adds_no_stop(template, tmp_path):
    assert end_of_turn(chatml_tokenizer(tmp_path / "model", template or None)) is None
