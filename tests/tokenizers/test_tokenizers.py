"""CLIP's tokenizer against stored reference ids; the contract every tokenizer keeps."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.errors import UserError
from clip_jax.tokenizers import (
    TokenizerSpec,
    make_clip_tokenizer,
    make_sentencepiece_tokenizer,
    make_tokenizer,
    train_sentencepiece,
)
from clip_jax.tokenizers.clip_bpe import ClipTokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "clip_bpe.json").read_text())
CAPTIONS = [
    f"a {size} {color} {thing} {place}"
    for size in ("small", "big", "tiny")
    for color in ("red", "blue", "green", "black")
    for thing in ("dog", "cat", "house", "bicycle", "photograph")
    for place in ("in the garden", "on a table", "under the sky")
]
# Any text a caption file can hold, lone surrogates among it (JSON can spell them).
TEXTS = st.lists(st.text(st.characters(), max_size=40), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return train_sentencepiece(CAPTIONS, tmp_path_factory.mktemp("spm") / "captions.model", 290)


@pytest.fixture(scope="module")
def json_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    bert = tokenizers.BertWordPieceTokenizer()
    bert.train_from_iterator(CAPTIONS, vocab_size=200, show_progress=False)
    bert.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    bert.save(str(path))
    return path


@pytest.fixture(scope="module", params=["clip", "sentencepiece", "huggingface", "clipa"])
def tokenizer(request, model_path, json_path):
    which = {
        "clip": "clip",
        "sentencepiece": str(model_path),
        "huggingface": str(json_path),
        "clipa": TokenizerSpec("huggingface", str(json_path), "whitespace", strip_sep=True),
    }
    return make_tokenizer(which[request.param])


def test_clip_ids_equal_the_reference():
    tokens = make_clip_tokenizer()([case["text"] for case in GOLDEN])
    assert len(GOLDEN) >= 250
    for case, row in zip(GOLDEN, tokens, strict=True):
        ids = case["ids"]
        expected = np.pad(ids, (0, 77 - len(ids)))
        np.testing.assert_array_equal(row, expected, repr(case["text"]))


def test_clip_ids_do_not_depend_on_what_came_before():
    texts = [case["text"] for case in GOLDEN]
    small_cache = ClipTokenizer(max_cached=3)
    np.testing.assert_array_equal(small_cache(texts[::-1])[::-1], make_clip_tokenizer()(texts))


def test_clip_facts():
    clip = make_clip_tokenizer()
    assert (clip.vocab_size, clip.sot_id, clip.eot_id, clip.pad_id) == (49408, 49406, 49407, 0)
    assert clip(["a diagram"])[0, :5].tolist() == [49406, 320, 22697, 49407, 0]
    assert clip.decode(clip(["A café, isn't it 😀?"])[0]) == "a café , isn 't it 😀?"


def test_clip_survives_an_entity_beyond_python_s_integers():
    clip = make_clip_tokenizer()
    assert clip(["&#" + "9" * 5000 + ";"]).shape == (1, 77)


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(2, 24))
def test_rows_keep_the_contract(tokenizer, texts, context_length):
    tokens = tokenizer(texts, context_length)
    assert tokens.dtype == np.int32
    assert tokens.shape == (len(texts), context_length)
    assert tokens.min() >= 0
    assert tokens.max() < tokenizer.vocab_size
    whole = tokenizer(texts, 400)
    for row, whole_row in zip(tokens, whole, strict=True):
        end = row.tolist().index(tokenizer.eot_id)
        assert (row[end + 1 :] == tokenizer.pad_id).all()
        # Cutting changes nothing before the end token.
        np.testing.assert_array_equal(row[:end], whole_row[:end])


@settings(max_examples=30, deadline=None)
@given(TEXTS)
def test_a_batch_is_its_texts(tokenizer, texts):
    one_by_one = np.concatenate([tokenizer([text]) for text in texts])
    np.testing.assert_array_equal(tokenizer(texts), one_by_one)


def test_small_cases(tokenizer):
    assert tokenizer([]).shape == (0, 77)
    np.testing.assert_array_equal(tokenizer("a dog"), tokenizer(["a dog"]))
    caption = "a small red dog in the garden"
    assert tokenizer.decode(tokenizer([caption.upper()])[0]) == caption
    long_row = tokenizer(["dog " * 500])[0]
    assert long_row[-1] == tokenizer.eot_id
    copy = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(copy([caption]), tokenizer([caption]))
    with pytest.raises(UserError, match="context_length is 1"):
        tokenizer(["a"], 1)


def test_training_is_deterministic_and_knows_every_character(model_path, tmp_path):
    again = train_sentencepiece(CAPTIONS, tmp_path / "again.model", 290)
    assert again.read_bytes() == model_path.read_bytes()
    spm = make_sentencepiece_tokenizer(model_path)
    assert (spm.vocab_size, spm.pad_id, spm.eot_id) == (290, 0, 1)
    unknown_id = 2
    tokens = spm(["日本 😀 é"])
    assert unknown_id not in tokens
    assert spm.decode(tokens[0]) == "日本 😀 é"


def test_ids_come_from_the_model(tmp_path):
    import sentencepiece

    prefix = str(tmp_path / "foreign")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_prefix=prefix, vocab_size=36,
        unk_id=0, bos_id=1, eos_id=5, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    foreign = make_sentencepiece_tokenizer(prefix + ".model")
    # The model has no pad piece: its end token pads.
    assert (foreign.eot_id, foreign.pad_id) == (5, 5)
    assert (foreign([""], 4) == 5).all()
    assert make_sentencepiece_tokenizer(prefix + ".model", pad_id=0)([""], 3).tolist() == [
        [5, 0, 0]
    ]
    canonical = make_sentencepiece_tokenizer(prefix + ".model", clean="canonicalize")
    np.testing.assert_array_equal(canonical(["A  Dog!_cat"]), foreign(["a dog cat"]))


@pytest.mark.parametrize("content", [b"", b"not a model", "half"])
def test_a_damaged_model_is_one_line(model_path, tmp_path, content):
    damaged = tmp_path / "damaged.model"
    whole = model_path.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(UserError, match="is not a SentencePiece model") as error:
        make_tokenizer(str(damaged))
    assert "\n" not in str(error.value)


def test_mistakes_are_named(model_path, tmp_path):
    with pytest.raises(UserError, match=r"absent\.model: No such file"):
        make_tokenizer(str(tmp_path / "absent.model"))
    with pytest.raises(UserError, match="unknown tokenizer 'bert'"):
        make_tokenizer("bert")
    with pytest.raises(UserError, match="set it to a value <="):
        train_sentencepiece(CAPTIONS, tmp_path / "x.model", 100_000)
    with pytest.raises(UserError, match="hold no text"):
        train_sentencepiece([], tmp_path / "x.model", 300)
    with pytest.raises(UserError, match="outside the 290 ids"):
        make_sentencepiece_tokenizer(model_path, pad_id=290)
    with pytest.raises(UserError, match="clean='upper'"):
        make_sentencepiece_tokenizer(model_path, clean="upper")
    assert not (tmp_path / "x.model").exists()
