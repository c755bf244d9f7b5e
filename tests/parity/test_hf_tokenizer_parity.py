"""Folders that transformers writes: our ids against open_clip's `HFTokenizer` on the same folder.

The tokenizers are small ones of each published kind, trained here: BERT's WordPiece (CLIPA), an
XLM-like and a T5-like unigram (MetaCLIP 2, SigLIP), a Gemma-like BPE (SigLIP 2).
"""

import json
import random

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizer_cases import CAPTIONS as ALL_CAPTIONS
from tokenizer_cases import random_any
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from clip_jax.tokenizers import (
    make_sentencepiece_tokenizer,
    make_tokenizer,
    tokenizer_from_folder,
)
from clip_jax.tokenizers.clean import canonicalize
from clip_jax.tokenizers.folder import write_clip_tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("open_clip")

CAPTIONS = ALL_CAPTIONS[:2000]
rng = random.Random(11)
TEXTS = [random_any(rng) for _ in range(800)] + CAPTIONS[:300]
TEXTS += ["", " ", "dog", "dog " * 400, "[SEP] dog [PAD]", "a </s> b <pad> <s>", "<eos> x"]
# open_clip's tokenizers raise on a lone surrogate.
TEXTS = [text.encode("utf-8", "replace").decode() for text in TEXTS]


def wrap(tokenizer, folder, **special):
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)


def bert(folder):
    tokenizer = tokenizers.BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(CAPTIONS, vocab_size=600, show_progress=False)
    transformers.BertTokenizer(vocab=tokenizer.get_vocab()).save_pretrained(folder)


def bert_generic(folder):
    tokenizer = tokenizers.BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(CAPTIONS, vocab_size=600, show_progress=False)
    names = {"pad_token": "[PAD]", "sep_token": "[SEP]", "cls_token": "[CLS]", "unk_token": "[UNK]"}
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    wrap(tokenizer._tokenizer, folder, **names)


def unigram(special, template):
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CAPTIONS[:300], trainer)
    ids = [(name, tokenizer.token_to_id(name)) for name in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


def xlm(folder):
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    wrap(unigram(["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>"), folder, **names)


def t5_padding_with_the_end(folder):
    names = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    wrap(unigram(["<pad>", "</s>", "<unk>"], "$A </s>"), folder, **names)


def t5_cut_and_padded_by_its_file(folder):
    tokenizer = unigram(["<pad>", "</s>", "<unk>"], "$A </s>")
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>", length=9)
    wrap(tokenizer, folder, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def gemma_bpe():
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer.train_from_iterator(
        CAPTIONS,
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))],
            show_progress=False,
            max_token_length=9,
        ),
    )
    return tokenizer


GEMMA = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}


def gemma(folder):
    wrap(gemma_bpe(), folder, **GEMMA, add_bos_token=False, add_eos_token=True)


def siglip2(folder):
    model = json.loads(gemma_bpe().to_str())["model"]
    transformers.Siglip2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
    ).save_pretrained(folder)


@pytest.mark.parametrize(
    "build, clean",
    [
        (bert, "whitespace"),
        (bert_generic, "lower"),
        (xlm, "whitespace"),
        (t5_padding_with_the_end, "canonicalize"),
        (t5_cut_and_padded_by_its_file, "lower"),
        (gemma, "canonicalize"),
        (gemma, "whitespace"),
        (siglip2, None),
    ],
)
def test_folders_as_open_clip_reads_them(build, clean, tmp_path):
    from open_clip.tokenizer import HFTokenizer

    build(tmp_path)
    reference = HFTokenizer(str(tmp_path), context_length=77, clean=clean or "canonicalize")
    spec = tokenizer_from_folder(tmp_path, clean=clean)
    assert spec is not None and spec.kind == "huggingface"
    tokenizer = make_tokenizer(spec)
    for length in (77, 8):
        expected = reference(TEXTS, length).numpy()
        pairs = zip(TEXTS, tokenizer(TEXTS, length), expected, strict=True)
        wrong = [text for text, a, b in pairs if (a != b).any()]
        assert not wrong, f"{len(wrong)} differ: {wrong[:3]}"
    assert (tokenizer.pad_id, tokenizer.eot_id) == (
        reference.tokenizer.pad_token_id,
        reference.tokenizer.eos_token_id or reference.tokenizer.sep_token_id,
    )


@pytest.mark.parametrize("build", [bert, bert_generic])
def test_clipa_without_its_separator(build, tmp_path):
    from open_clip.tokenizer import HFTokenizer

    build(tmp_path)
    reference = HFTokenizer(str(tmp_path), context_length=32, strip_sep_token=True)
    tokenizer = make_tokenizer(tokenizer_from_folder(tmp_path, "clipa"))
    np.testing.assert_array_equal(tokenizer(TEXTS, 32), reference(TEXTS).numpy())
    assert tokenizer.eot_id == 0 and (tokenizer(TEXTS, 32)[:, -1] == 0).all()


@pytest.fixture(scope="module")
def siglip_model(tmp_path_factory):
    """Train a model with c4_en's special ids (pad 0, end 1, unknown 2), lower-cased as it is."""
    prefix = tmp_path_factory.mktemp("siglip") / "spiece"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([canonicalize(text) for text in CAPTIONS]),
        model_prefix=str(prefix), vocab_size=400, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        shuffle_input_sentence=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


def test_siglip_as_transformers_reads_its_model(siglip_model, tmp_path):
    """Its `SiglipTokenizer` mends no mojibake and drops "_", and takes "</s>" for the end."""
    reference = transformers.SiglipTokenizer(str(siglip_model))
    reference.save_pretrained(tmp_path)
    spec = tokenizer_from_folder(tmp_path)
    assert spec is not None
    assert (spec.kind, spec.clean, spec.pad_id) == ("sentencepiece", "canonicalize", 1)
    tokenizer = make_tokenizer(spec)
    texts = [text for text in CAPTIONS if "_" not in text and "&" not in text and text.isascii()]
    texts += ["", "dog " * 300, "A dog's, (red) house!", "x\ty\nz"]
    expected = reference(texts, padding="max_length", max_length=64, truncation=True)["input_ids"]
    np.testing.assert_array_equal(tokenizer(texts, 64), expected)
    assert len(texts) > 1000


def test_siglip_as_open_clip_reads_its_folder(siglip_model, tmp_path):
    """T5's tokenizer made of the model, padding with the end token, as timm's SigLIP folders."""
    from open_clip.tokenizer import HFTokenizer

    config = {"tokenizer_class": "T5Tokenizer", "pad_token": "</s>", "extra_ids": 0}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "spiece.model").write_bytes(siglip_model.read_bytes())
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    spec = tokenizer_from_folder(tmp_path, "siglip")
    assert spec is not None
    assert spec.kind == "huggingface"
    tokenizer = make_tokenizer(spec)
    reference = HFTokenizer(str(tmp_path), 64, clean="canonicalize")
    np.testing.assert_array_equal(tokenizer(TEXTS, 64), reference(TEXTS).numpy())
    assert (tokenizer.pad_id, tokenizer.eot_id) == (1, 1)
    # Google's library on the model itself gives the same pieces for captions. (For a few marks,
    # U+0345 behind a keycap for one, the two libraries' normalizers differ.)
    model = make_sentencepiece_tokenizer(siglip_model, pad_id=1, clean="canonicalize")
    np.testing.assert_array_equal(model(CAPTIONS, 64), tokenizer(CAPTIONS, 64))


def test_clip_folders_are_recognized_by_content(tmp_path):
    write_clip_tokenizer(tmp_path, 77)
    names = {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path, **names)
    saved = tmp_path / "saved"
    tokenizer.save_pretrained(saved)
    assert json.loads((saved / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    spec = tokenizer_from_folder(saved)
    assert spec is not None and spec.kind == "clip"
    # Without mojibake and HTML its ids are the same up to the padding behind the first end token.
    texts = [t for t in CAPTIONS if t.isascii() and "&" not in t]
    expected = tokenizer(texts, padding="max_length", max_length=77, truncation=True)["input_ids"]
    tokens = make_tokenizer(spec)(texts)
    np.testing.assert_array_equal(
        np.where(tokens == 0, 49407, tokens), np.where(np.array(expected) == 0, 49407, expected)
    )
