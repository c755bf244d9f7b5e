"""Tokenizers found in folders and stored as specs: the right one, or one line."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from clip_jax.errors import UserError
from clip_jax.tokenizers import (
    TokenizerSpec,
    make_clip_tokenizer,
    make_hf_tokenizer,
    make_tokenizer,
    spec_from_json,
    spec_to_json,
    tokenizer_from_folder,
    tokenizer_spec,
    train_sentencepiece,
)
from clip_jax.tokenizers.clip_bpe import END, START, read_merges, vocabulary
from clip_jax.tokenizers.folder import write_clip_tokenizer

WORDS = [
    "a",
    "the",
    "small",
    "red",
    "dog",
    "cat",
    "house",
    "in",
    "garden",
    "sky",
    "photo",
    "of",
    "two",
]
CAPTIONS = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS[::3]]


@pytest.fixture(scope="module")
def bert_text():
    """Return a small BERT: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    return with_template(tokenizer.to_str(), "[CLS] $A [SEP]")


def with_template(text, template):
    """Return the same tokenizer with other tokens around a text, or none."""
    tokenizer = tokenizers.Tokenizer.from_str(text)
    ids = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer.to_str()


@pytest.fixture
def bert_folder(tmp_path, bert_text):
    (tmp_path / "tokenizer.json").write_text(bert_text)
    return tmp_path


def test_rows_of_a_tokenizer_json(bert_folder, bert_text):
    size = len(json.loads(bert_text)["model"]["vocab"])
    tokenizer = make_tokenizer(str(bert_folder / "tokenizer.json"))
    assert (tokenizer.eot_id, tokenizer.pad_id, tokenizer.vocab_size) == (3, 0, size)
    row = tokenizer(["the Dog"], 8)[0].tolist()
    assert row[0] == 2 and row[3:] == [3, 0, 0, 0, 0]
    assert tokenizer.decode(row) == "the dog"
    assert tokenizer(["the dog " * 50], 5)[0].tolist() == [2, row[1], row[2], row[1], 3]


def test_clipa_has_no_end_token(bert_folder):
    spec = tokenizer_from_folder(bert_folder, "clipa")
    assert spec == TokenizerSpec(
        "huggingface", str(bert_folder / "tokenizer.json"), "whitespace", pad_id=0, strip_sep=True
    )
    tokenizer = make_tokenizer(spec)
    plain = make_hf_tokenizer(bert_folder / "tokenizer.json")(["the dog", "the dog " * 50], 6)
    np.testing.assert_array_equal(
        tokenizer(["the dog", "the dog " * 50], 6), np.where(plain == 3, 0, plain)
    )
    assert tokenizer.eot_id == tokenizer.pad_id == 0


def test_the_config_frames_the_text_as_transformers_does(tmp_path, bert_text):
    (tmp_path / "tokenizer.json").write_text(with_template(bert_text, "$A"))
    with pytest.raises(UserError, match="sets no end token"):
        tokenizer_from_folder(tmp_path)
    config = {"add_bos_token": True, "bos_token": {"content": "[CLS]"}, "eos_token": "[SEP]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_eos_token": True}))
    spec = tokenizer_from_folder(tmp_path, "clip")
    assert spec is not None and (spec.sot_id, spec.eot_id) == (2, 3)
    framed = make_tokenizer(spec)(CAPTIONS, 12)
    (tmp_path / "tokenizer.json").write_text(bert_text)
    np.testing.assert_array_equal(
        framed, make_hf_tokenizer(tmp_path / "tokenizer.json")(CAPTIONS, 12)
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="add_eos_token is off"):
        tokenizer_from_folder(tmp_path)


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.model"])
def test_sentencepiece_folders(tmp_path, name):
    train_sentencepiece(CAPTIONS, tmp_path / name, 280)
    spec = tokenizer_from_folder(tmp_path)
    assert spec == TokenizerSpec("sentencepiece", str(tmp_path / name), "whitespace")
    siglip = tokenizer_from_folder(tmp_path, "siglip")
    assert siglip == TokenizerSpec("sentencepiece", str(tmp_path / name), "canonicalize", pad_id=1)
    tokens = make_tokenizer(siglip)(["A big, red dog!"], 64)
    assert tokens.shape == (1, 64) and tokens[0, -1] == 1 and 0 not in tokens
    padded_with_pad = tokenizer_from_folder(tmp_path, "siglip2")
    assert padded_with_pad is not None and padded_with_pad.pad_id == 0
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer"}')
    assert tokenizer_from_folder(tmp_path) == siglip
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "nothing"}')
    with pytest.raises(UserError, match="has no 'nothing'"):
        tokenizer_from_folder(tmp_path)


def test_clip_is_known_by_its_merges(tmp_path):
    assert tokenizer_from_folder(tmp_path) is None
    write_clip_tokenizer(tmp_path, 77)
    assert tokenizer_from_folder(tmp_path) == TokenizerSpec()
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()
    swapped = [lines[0], lines[2], lines[1], *lines[3:]]
    (tmp_path / "merges.txt").write_text("\n".join(swapped) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"vocab\.json and merges\.txt, which do not suffice"):
        tokenizer_from_folder(tmp_path)
    (tmp_path / "merges.txt").unlink()
    (tmp_path / "vocab.json").unlink()
    merges = read_merges()
    pairs = [list(pair) for pair in merges]
    vocab = {piece: i for i, piece in enumerate([*vocabulary(merges), START, END])}
    model = {"type": "BPE", "vocab": vocab, "merges": pairs}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    assert tokenizer_from_folder(tmp_path) == TokenizerSpec()


def test_specs_survive_json(bert_folder):
    specs = [
        TokenizerSpec(),
        TokenizerSpec("sentencepiece", "x.model", "lower", pad_id=3),
        TokenizerSpec("huggingface", "tokenizer.json", "none", 1, 2, 3, True),
    ]
    for spec in specs:
        assert spec_from_json(json.loads(json.dumps(spec_to_json(spec)))) == spec
    assert spec_to_json(TokenizerSpec()) == {"kind": "clip"}
    assert (
        spec_from_json("a/b.model")
        == tokenizer_spec("a/b.model")
        == TokenizerSpec("sentencepiece", "a/b.model")
    )
    beside = TokenizerSpec("huggingface", "tokenizer.json")
    assert make_tokenizer(beside, folder=bert_folder).eot_id == 3
    np.testing.assert_array_equal(
        make_tokenizer(TokenizerSpec())(["a dog"]), make_clip_tokenizer()(["a dog"])
    )


@pytest.mark.parametrize(
    "fields, message",
    [
        (3, "its fields are"),
        ({"type": "clip"}, "its fields are"),
        ({"kind": "bpe"}, "kind is 'bpe'"),
        ({"kind": ["clip"]}, "kind is"),
        ({"kind": "huggingface"}, "needs a file"),
        ({"kind": "clip", "clean": "lower"}, "takes no clean"),
        ({"kind": "sentencepiece", "file": "x", "strip_sep": True}, "takes no strip_sep"),
        ({"kind": "huggingface", "file": "x", "clean": "upper"}, "clean='upper'"),
        ({"kind": "huggingface", "file": "x", "pad_id": -1}, "pad_id is -1"),
        ({"kind": "huggingface", "file": "x", "eot_id": True}, "eot_id is True"),
        ({"kind": "huggingface", "file": "x", "strip_sep": 1}, "no boolean"),
    ],
)
def test_nonsense_in_a_spec_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        spec_from_json(fields)


def test_mistakes_are_named(bert_folder, bert_text):
    path = bert_folder / "tokenizer.json"
    with pytest.raises(UserError, match="No such file"):
        make_hf_tokenizer(bert_folder / "absent.json")
    with pytest.raises(UserError, match="pad_id 600 is outside"):
        make_hf_tokenizer(path, pad_id=600)
    with pytest.raises(UserError, match="clean='x'"):
        make_hf_tokenizer(path, clean="x")
    with pytest.raises(UserError, match="family 'bert'"):
        tokenizer_from_folder(bert_folder, "bert")
    config = bert_folder / "tokenizer_config.json"
    for text, message in [
        ('{"padding_side": "left"}', "padding_side must be right"),
        ('{"pad_token": 3}', "pad_token is 3"),
        ("[]", "must hold a JSON object"),
        ("{", r"is damaged: .*; fetch it again$"),
        ("[" * 100_000, r"is damaged: .*; fetch it again$"),
    ]:
        config.write_text(text)
        with pytest.raises(UserError, match=message):
            tokenizer_from_folder(bert_folder)
    config.unlink()
    path.write_text(with_template(bert_text, "$A [SEP] [SEP]"))
    with pytest.raises(UserError, match="an unclear end token"):
        make_hf_tokenizer(path)
    content = json.loads(bert_text)
    content["post_processor"]["special_tokens"]["[CLS]"]["ids"] = [2**31]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="its template adds id 2147483648"):
        make_hf_tokenizer(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"it is no UTF-8 text; fetch it again$"):
        make_hf_tokenizer(path)
    path.unlink()
    with pytest.raises(
        UserError, match=r"cannot read .*: No such file or directory; fetch it again$"
    ):
        make_hf_tokenizer(path)
    path.mkdir()
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory; make it a file that you"):
        make_hf_tokenizer(path)
    path.rmdir()
    (bert_folder / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"vocab\.txt, which do not suffice"):
        tokenizer_from_folder(bert_folder)


@pytest.mark.parametrize("merges", [["▁ a"], [["▁", "a"]], [["x"]], [3], [None]])
def test_a_prefix_that_cuts_characters_is_refused(tmp_path, merges):
    """The Rust library would end the process, which no `except` sees."""
    model = {"type": "BPE", "continuing_subword_prefix": "x", "vocab": {}, "merges": merges}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    with pytest.raises(UserError, match="lacks the prefix 'x'"):
        make_hf_tokenizer(tmp_path / "tokenizer.json")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_file_is_a_tokenizer_or_one_line(bert_text, tmp_path_factory, data):
    """Cut, with bytes changed, or with a part of another type: never another exception."""
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / "tokenizer.json"
    kind = data.draw(st.sampled_from(["cut", "bytes", "part"]))
    if kind == "part":
        content = json.loads(bert_text)
        key = data.draw(st.sampled_from(sorted(content)))
        inner = content[key] if isinstance(content[key], dict) else content
        values = st.sampled_from([None, 0, -1, 2**40, "x", [], [[]], {}, {"type": "BPE"}, 1e300])
        inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(values)
        path.write_text(json.dumps(content))
    else:
        raw = bytearray(bert_text.encode())
        if kind == "cut":
            raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
        else:
            for _ in range(data.draw(st.integers(1, 5))):
                raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(bytes(raw))
    try:
        spec = tokenizer_from_folder(folder, "clipa")
        assert spec is not None
        tokens = make_tokenizer(spec)(["the dog", "日本 😀"], 9)
        assert tokens.shape == (2, 9) and tokens.dtype == np.int32
    except UserError as error:
        assert "\n" not in str(error)


def test_an_nllbs_language_stands_before_a_text(tmp_path):
    """Its older files have a template that sets the language behind the end token."""
    vocab = ["<s>", "<pad>", "</s>", "<unk>", "a", "dog", "eng_Latn", "deu_Latn"]
    model = models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s> eng_Latn", special_tokens=[("</s>", 2), ("eng_Latn", 6)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    spec = tokenizer_from_folder(tmp_path, "nllb")
    assert (spec.sot_id, spec.eot_id, spec.pad_id) == (6, 2, 1)
    rows = make_tokenizer(spec)(["a dog", "a " * 9], 6)
    np.testing.assert_array_equal(rows, [[6, 4, 5, 2, 1, 1], [6, 4, 4, 4, 4, 2]])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"src_lang": "deu_Latn"}))
    assert tokenizer_from_folder(tmp_path, "nllb").sot_id == 7
