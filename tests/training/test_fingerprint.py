"""The fingerprint of a run: every field of the config is in it or may change on a resume."""

import dataclasses
import json

import pytest
from tiny import VIT

from clip_jax.errors import UserError
from clip_jax.sections import Config, fixed_values
from clip_jax.tokenizers import TokenizerSpec
from clip_jax.training.fingerprint import check_fingerprint, complete_fingerprint, run_fingerprint

# All that a resumed run may have otherwise, beside what decides how it runs and what is measured.
MAY_CHANGE = {
    *(f"model.{name}" for name in ("image_size", "context_length", "attention", "remat", "scan")),
    *(f"train.{name}" for name in ("steps", "epochs", "microbatch_size", "loss_tile", "log_every")),
    *(f"data.{name}" for name in ("train", "tokenizer", "threads", "cache_bytes", "log_keys")),
    "data.max_skip_fraction",
    *(f"data.{name}" for name in ("processes", "caption_packing")),
    *(f"train.{name}" for name in ("compile_cache", "compile_ahead")),
    "optim.split",
}
FREE_SECTIONS = ("mesh", "eval", "checkpoint")
# What earlier versions put into their checkpoints.
OLD_KEYS = {
    "config.seed",
    *(f"config.model.{name}" for name in ("name", "dtype")),
    *(f"config.train.{name}" for name in ("batch_size", "loss")),
    *(f"config.data.{name}" for name in ("streams", "window", "weights", "repeat", "filter")),
    *(f"config.data.{name}" for name in ("crop_scale", "crop_ratio", "color_jitter", "flip")),
    "config.data.grayscale",
    "the model's sizes",
    "the number of training pairs",
    "the training data's fingerprint",
}


def all_fields() -> list[str]:
    names = []
    for field in dataclasses.fields(Config):
        section = getattr(Config(), field.name)
        inner = dataclasses.fields(section) if dataclasses.is_dataclass(section) else []
        names += [f"{field.name}.{f.name}" for f in inner] or [field.name]
    return names


def another(value):
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "x"
    return (*value, 0.5) if isinstance(value, tuple) else value + 1


def changed(config: Config, name: str) -> Config:
    section, _, field = name.partition(".")
    if not field:
        return dataclasses.replace(config, **{section: another(getattr(config, section))})
    old = getattr(config, section)
    new = dataclasses.replace(old, **{field: another(getattr(old, field))})
    return dataclasses.replace(config, **{section: new})


BPE = TokenizerSpec()


def fingerprint(config=None, model=VIT, tokenizer=BPE, data="abc", pairs=96):
    return run_fingerprint(config or Config(), model, tokenizer, data=data, pairs=pairs)


def of_an_earlier_version(made: dict) -> dict:
    return {key: value for key, value in made.items() if key in OLD_KEYS}


@pytest.mark.parametrize("name", all_fields())
def test_every_field_is_marked_or_refused_when_it_is_changed(name):
    now = fingerprint(changed(Config(), name))
    free = name in MAY_CHANGE or name.split(".")[0] in FREE_SECTIONS
    if free:
        check_fingerprint(fingerprint(), now, "runs/x")
    else:
        with pytest.raises(UserError, match=rf"runs/x was made with config\.{name} = "):
            check_fingerprint(fingerprint(), now, "runs/x")


def test_what_is_not_the_configs_is_refused_by_a_human_name(tmp_path):
    file, other = tmp_path / "a.model", tmp_path / "b.model"
    file.write_bytes(b"pieces")
    other.write_bytes(b"other pieces")
    before = fingerprint(tokenizer=TokenizerSpec("sentencepiece", str(file)))

    def refuses(message, **changes):
        options = {"tokenizer": TokenizerSpec("sentencepiece", str(file)), **changes}
        with pytest.raises(UserError, match=f"made with {message} = ") as caught:
            check_fingerprint(before, fingerprint(**options), "runs/x")
        assert "\n" not in str(caught.value)

    refuses("the model's sizes", model=dataclasses.replace(VIT, embed_dim=8))
    refuses("the number of training pairs", pairs=48)
    refuses("the training data's fingerprint", data="def")
    refuses("the tokenizer's fingerprint", tokenizer=TokenizerSpec("sentencepiece", str(other)))
    # The same content at another place.
    other.write_bytes(b"pieces")
    moved = fingerprint(tokenizer=TokenizerSpec("sentencepiece", str(other)))
    check_fingerprint(before, moved, "runs/x")


def test_it_is_json():
    made = fingerprint()
    assert json.loads(json.dumps(made)) == made
    assert set(fixed_values(Config())) < set(made)


CHANGES = {
    "train.mask_equal_captions": (True, False),
    "optim.learning_rate": (3e-3, 1e-3),
    "data.max_pixels": (1_000, 2_000),
    "data.unique_keys": (True, False),
    "model.init_from": ("runs/y", ""),
}


def with_values(values: dict) -> Config:
    config = Config()
    for name, value in values.items():
        section, _, field = name.partition(".")
        new = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: new})
    return config


def write_config(workdir, config: Config, without: tuple[str, ...] = ()):
    values = dataclasses.asdict(config)
    for name in without:
        section, _, field = name.partition(".")
        del values[section][field]
    (workdir / "config.json").write_text(json.dumps({"config": values}))


def test_a_run_of_an_earlier_version_goes_on_with_its_own_config(tmp_path):
    values = {name: first for name, (first, _) in CHANGES.items()}
    config = with_values(values)
    write_config(tmp_path, config)
    saved = of_an_earlier_version(fingerprint(config))
    complete = complete_fingerprint(saved, tmp_path)
    check_fingerprint(complete, fingerprint(config), tmp_path)
    # Which tokenizer it had is not known any more.
    check_fingerprint(complete, fingerprint(config, tokenizer=TokenizerSpec(pad_id=3)), tmp_path)
    for name, (_, other) in CHANGES.items():
        now = fingerprint(with_values(values | {name: other}))
        with pytest.raises(UserError, match=f"made with config.{name} = "):
            check_fingerprint(complete, now, tmp_path)


def test_fields_that_an_earlier_version_did_not_have_were_at_their_defaults(tmp_path):
    write_config(tmp_path, Config(), without=tuple(CHANGES))
    complete = complete_fingerprint(of_an_earlier_version(fingerprint()), tmp_path)
    check_fingerprint(complete, fingerprint(), tmp_path)
    for name, (first, second) in CHANGES.items():
        value = first if first != fixed_values(Config())[f"config.{name}"] else second
        with pytest.raises(UserError, match=f"made with config.{name} = "):
            check_fingerprint(complete, fingerprint(with_values({name: value})), tmp_path)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_without_a_config_nothing_is_known_of_what_is_missing(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    saved = of_an_earlier_version(fingerprint())
    assert complete_fingerprint(saved, tmp_path) == saved
