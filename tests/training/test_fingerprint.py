"""The fingerprint of a run: every field of the config is in it or may change on a resume."""

import dataclasses
import json

import pytest
from tiny import VIT

from clip_jax.errors import UserError
from clip_jax.sections import Config, fixed_values
from clip_jax.tokenizers import TokenizerSpec
from clip_jax.training.fingerprint import (
    changed_settings,
    check_fingerprint,
    check_new_folder,
    complete_fingerprint,
    run_fingerprint,
)
from clip_jax.training.warm_start import source_digest

# All that a resumed run may have otherwise, beside what decides how it runs and what is measured.
MAY_CHANGE = {
    *(f"model.{name}" for name in ("image_size", "context_length", "attention", "remat", "scan")),
    *(f"train.{name}" for name in ("steps", "epochs", "microbatch_size", "loss_tile", "log_every")),
    *(f"data.{name}" for name in ("train", "tokenizer", "threads", "cache_bytes", "log_keys")),
    "optim.cooldown_steps",
    "data.max_skip_fraction",
    *(f"data.{name}" for name in ("processes", "caption_packing", "decode_seconds")),
    *(f"train.{name}" for name in ("compile_cache", "compile_ahead")),
    *(f"train.report_{name}" for name in ("to", "project", "name")),
    "optim.split",
    *("distill.teachers", "distill.features"),
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


def fingerprint(config=None, model=VIT, tokenizer=BPE, **others):
    others = {"data": "abc", "pairs": 96, "contents": "c", "source": "s"} | others
    return run_fingerprint(config or Config(), model, tokenizer, **others)


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
    refuses("the contents of the training shards", contents="d")
    refuses("the contents of the first weights", source="t")
    refuses("the teachers' weights", teachers=["a teacher"])
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
        if not field:
            config = dataclasses.replace(config, **{section: value})
            continue
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


def test_what_is_allowed_may_change_and_is_returned():
    changed_lr = with_values({"optim.learning_rate": 1e-3})
    now = fingerprint(changed_lr, tokenizer=TokenizerSpec(pad_id=3), contents=None, pairs=95)
    allowed = ["config.optim.learning_rate", "config.data.tokenizer"]
    with pytest.raises(UserError, match=r"training pairs .*--allow-change config\.data\.train$"):
        check_fingerprint(fingerprint(), now, "runs/x", allowed)
    changes = check_fingerprint(fingerprint(), now, "runs/x", [*allowed, "config.data.train"])
    assert changes["config.optim.learning_rate"] == (5e-4, 1e-3)
    assert set(changes) == {
        "config.optim.learning_rate",
        "the number of training pairs",
        "the tokenizer's fingerprint",
    }
    # No flag makes other arrays fit.
    other_model = fingerprint(model=dataclasses.replace(VIT, embed_dim=8))
    with pytest.raises(UserError, match=r"the model's sizes .*choose another --workdir$"):
        check_fingerprint(fingerprint(), other_model, "runs/x", allowed)


def test_a_new_run_takes_no_folder_that_holds_something_else(tmp_path):
    def refuses(message, **allowed):
        with pytest.raises(UserError, match=message):
            check_new_folder(fingerprint(), tmp_path, **allowed)

    assert check_new_folder(fingerprint(), tmp_path) == {}
    (tmp_path / "metrics.jsonl").touch()
    refuses(r"holds metrics\.jsonl and no config\.json of a run; give another")
    for content in ('{"architectures": ["CLIPModel"]}', '{"model_name": "x", "config": {}}', "{"):
        (tmp_path / "config.json").write_text(content)
        refuses(r"holds a config\.json that is not of a run")
    # Its own beginning, and that of another run.
    write_config(tmp_path, Config())
    assert check_new_folder(fingerprint(), tmp_path) == {}
    other = with_values({"seed": 1, "train.log_every": 3})
    write_config(tmp_path, other)
    refuses(r"made with config\.seed = 1 and now it is 0; .*--allow-change config\.seed")
    assert check_new_folder(fingerprint(), tmp_path, ["config.seed"]) == {"config.seed": (1, 0)}
    assert changed_settings(tmp_path, Config()) == {
        "config.seed": (1, 0),
        "config.train.log_every": (3, 10),
    }


def test_the_first_weights_are_told_apart_by_their_bytes(tmp_path):
    file = tmp_path / "a.safetensors"
    with file.open("wb") as opened:
        opened.truncate(65 << 20)
    zeros = source_digest(str(file))
    with file.open("r+b") as opened:
        opened.seek(-1, 2)
        opened.write(b"x")
    assert source_digest(str(file)) != zeros
    small = tmp_path / "small" / "model.safetensors"
    small.parent.mkdir()
    digests = set()
    for content in (b"", b"a", b"b"):
        small.write_bytes(content)
        digests |= {source_digest(str(small)), source_digest(str(small.parent))}
    # A folder of one file is that file.
    assert len(digests) == 3
    assert source_digest("") is source_digest("ViT-B-32:openai") is None
