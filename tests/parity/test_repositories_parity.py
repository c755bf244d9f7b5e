"""The table of repositories is open_clip's."""

import pytest

open_clip = pytest.importorskip("open_clip")

from open_clip.factory import get_model_config  # noqa: E402
from open_clip.pretrained import _PRETRAINED  # noqa: E402

from clip_jax.pretrained.repositories import (  # noqa: E402
    OPENAI_SHA256,
    TOKENIZER_REPOSITORIES,
    openai_address,
    repositories,
)

# Its table names epoch 31 in the repository of epoch 32, and the right address beside it.
BY_ADDRESS = ("ViT-B-16-plus-240", "laion400m_e32")


def test_every_pair_lies_where_open_clip_fetches_it():
    plain = {name: tags for name, tags in _PRETRAINED.items() if "quickgelu" not in name}
    assert repositories().keys() == plain.keys()
    for model, tags in plain.items():
        assert repositories()[model].keys() == tags.keys()
        for tag, cfg in tags.items():
            key = "url" if (model, tag) == BY_ADDRESS else "hf_hub"
            assert repositories()[model][tag] == cfg[key].rstrip("/")


def test_every_tokenizer_is_in_the_repository_of_its_config():
    for model, tags in repositories().items():
        name = get_model_config(model)["text_cfg"].get("hf_tokenizer_name")
        if name is None:
            assert model not in TOKENIZER_REPOSITORIES
            continue
        for place in tags.values():
            own = "/".join(place.split("/")[:2])
            assert TOKENIZER_REPOSITORIES.get(model, own) == name


def test_openais_addresses_are_open_clips():
    addresses = {cfg["openai"]["url"] for cfg in _PRETRAINED.values() if "openai" in cfg}
    assert addresses == {openai_address(name) for name in OPENAI_SHA256}
