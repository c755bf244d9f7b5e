"""The hub on loopback: what is fetched, from where to where, and how thirty faults end."""

import dataclasses
import functools
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import chex
import numpy as np
import pytest
from hub_server import Repo, answers, fault, hangs_up, sends, serve
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

import clip_jax
from clip_jax import api
from clip_jax.errors import UserError
from clip_jax.models import zoo
from clip_jax.pretrained import by_name, download, hub, repositories, tags
from clip_jax.pretrained.by_name import parse_name, read_model
from clip_jax.pretrained.download import PARTIAL
from clip_jax.pretrained.load import read_checkpoint
from clip_jax.pretrained.trees import from_variables
from clip_jax.sections import ModelSection
from clip_jax.tokenizers import train_sentencepiece
from clip_jax.tools.convert import convert
from clip_jax.tools.evaluate import model_label
from clip_jax.training.setup import find_source

GOLDEN = Path(__file__).parents[1] / "golden" / "published"
NAME = "hf-hub:me/model"
TESTS = Path(__file__).parents[1]


def published(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (GOLDEN / name).iterdir()}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub with one model, and an empty cache."""
    with serve() as running:
        point_to(monkeypatch, running.address)
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 5)
        monkeypatch.setenv("HOME", str(tmp_path))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        for module in (download, hub):
            monkeypatch.setattr(module, "PAUSE", 0.0)
        running.repos["me/model"] = Repo(published("open_clip"))
        yield running


def point_to(monkeypatch, address):
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def weights(server, name="me/model", file="open_clip_model.safetensors") -> bytes:
    return server.repos[name].files[file]


def cache(name="me/model") -> Path:
    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


def partial_of(data: bytes) -> Path:
    return cache() / "blobs" / (hashlib.sha256(data).hexdigest() + PARTIAL)


def assert_same(one, other):
    assert one.config == other.config and one.preprocess == other.preprocess
    assert one.arrays.keys() == other.arrays.keys()
    for path, read in one.arrays.items():
        np.testing.assert_array_equal(read(), other.arrays[path](), strict=True)


@pytest.mark.parametrize("name", ["open_clip", "hf_clip", "hf_siglip"])
def test_a_repository_is_what_its_folder_is(server, capsys, name):
    server.repos["me/other"] = Repo(published(name))
    loaded = read_model("hf-hub:me/other")
    assert_same(loaded, read_checkpoint(GOLDEN / name))
    assert loaded.name == "other"
    line, *notes = capsys.readouterr().err.splitlines()
    assert all("images are prepared as those of" in note for note in notes)
    assert (
        "fetching hf-hub:me/other: " in line
        and "kB, to " in line
        and str(cache("me/other")) in line
    )
    asked = len(server.asked)
    read_model("hf-hub:me/other")  # again: the listing, and nothing else
    assert len(server.asked) == asked + 1 and capsys.readouterr().err == ""


def test_the_line_comes_before_the_first_byte(server, capfd):
    seen = []
    server.faults.append(
        lambda handler: "/resolve/" in handler.path and seen.append(capfd.readouterr().err)
    )
    read_model(NAME)
    assert "fetching" in seen[0] and "109.0 kB" in seen[0]


def test_load_takes_a_name(server):
    clip = clip_jax.load(NAME)
    local = read_checkpoint(GOLDEN / "open_clip")
    assert clip.name == "model" and clip.config == local.config
    chex.assert_trees_all_equal(
        from_variables(clip.params, {}), {path: read() for path, read in local.arrays.items()}
    )


def test_create_and_the_lists_ask_nobody(server, monkeypatch):
    monkeypatch.setattr(api, "init_variables", lambda model, seed: {"params": {}})
    clip_jax.create("RN50")  # a name that `load` fetches
    assert clip_jax.list_models() and clip_jax.list_pretrained()
    assert server.asked == []


def test_a_run_starts_from_a_name_and_a_dry_run_asks_nobody(server):
    section = ModelSection(name="RN50", init_from=NAME)
    assert find_source(section, None) is None and server.asked == []
    source = find_source(section, "no/such/run")
    assert source.path == NAME  # what messages say
    assert_same(source.checkpoint, read_checkpoint(GOLDEN / "open_clip"))


def test_names_of_files_and_results():
    assert model_label("ViT-B-32:openai") == ("ViT-B-32-openai", "openai")
    assert model_label("ViT-L/14@336px") == ("ViT-L-14@336px", "openai")
    assert model_label("hf-hub:me/mine@v1") == ("mine", "me/mine")
    assert model_label("runs/mine.pt") == ("mine", "")


def test_a_revision_is_another_cache_entry(server):
    server.repos["me/model"].revisions = ("main", "v2")
    read_model(f"{NAME}@v2")
    assert (cache() / "refs" / "v2").read_text() == server.repos["me/model"].commit
    read_model(f"{NAME}@{server.repos['me/model'].commit}")
    assert len(server.bodies()) == 1


def test_safetensors_go_before_pickles(server):
    files = server.repos["me/model"].files
    files["open_clip_pytorch_model.bin"] = b"x" * 10_000
    read_model(NAME)
    # open_clip's pickle beside Hugging Face's safetensors
    server.repos["me/both"] = Repo(
        {
            **published("hf_clip"),
            "open_clip_config.json": b"{}",
            "open_clip_pytorch_model.bin": b"x" * 9000,
        }
    )
    assert_same(read_model("hf-hub:me/both"), read_checkpoint(GOLDEN / "hf_clip"))
    assert not any(".bin" in path for path in server.paths())


def test_no_pickle_runs(server, tmp_path):
    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    files = server.repos["me/model"].files
    del files["open_clip_model.safetensors"]
    files["open_clip_pytorch_model.bin"] = pickle.dumps(Runs()) + b" " * 9000
    refuses("is not a file of torch.save")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(Runs()) + b" " * 9000)
    files["open_clip_pytorch_model.bin"] = packed.getvalue()
    refuses("system")
    assert not (tmp_path / "ran").exists()


def test_shards_come_with_their_index(server, tmp_path):
    arrays = load_file(GOLDEN / "hf_clip" / "model.safetensors")
    names, files = sorted(arrays), published("hf_clip")
    del files["model.safetensors"]
    places = {}
    for i, part in enumerate((names[::2], names[1::2])):
        shard = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: arrays[name] for name in part}, tmp_path / shard)
        files[shard] = (tmp_path / shard).read_bytes()
        places |= dict.fromkeys(part, shard)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": places}).encode()
    files["training_args.bin"] = b"x" * 9000
    server.repos["me/shards"] = Repo(files)
    assert_same(read_model("hf-hub:me/shards"), read_checkpoint(GOLDEN / "hf_clip"))
    assert not any("training_args" in path for path in server.paths())


@pytest.mark.parametrize(
    "listed",
    [
        {"size": None},
        {"size": 109_000, "lfs": {"sha256": "../../../x", "size": 109_000, "pointerSize": 1}},
        {"size": 20_000_000, "blobId": "0" * 40},
        {"size": "many", "blobId": "0" * 40},
    ],
    ids=["names alone", "a path for a digest", "a pointer's digest", "no number"],
)
def test_a_mirror_that_lists_no_digests_is_left_to_the_hubs_own_code(server, listed):
    server.repos["me/model"].listed = listed
    assert_same(read_model(NAME), read_checkpoint(GOLDEN / "open_clip"))
    assert not list(Path(constants.HF_HOME).parent.glob("**/x*"))


def test_a_token_goes_to_the_hub_alone(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    server.repos["me/model"].token = "secret"
    read_model(NAME)
    for line, headers in server.asked:
        assert ("authorization" in map(str.lower, headers)) == ("/cdn/" not in line), line


def refuses(message: str, name: str = NAME) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read_model(name)
    assert "\n" not in str(raised.value)


def test_wrong_names_say_what_there_is(server, tmp_path, monkeypatch):
    refuses("has no tag 'laion2b'; there is .*ViT-B-32:laion2b_e16", "ViT-B-32:laion2b")
    refuses("names no tag; there is ViT-B-32:openai", "ViT-B-32")
    for name in ("hf-hub:a/b/c", "hf-hub:", "hf-hub:a/b@../c"):
        refuses("write hf-hub:owner/name", name)
    refuses("does not exist; give a checkpoint's file or folder, or a name", "no/such/file.pt")
    assert parse_name("no-such-model:tag") is None
    assert parse_name("ViT-B-32:LAION2B-s34b-b79k").pair == "ViT-B-32:laion2b_s34b_b79k"
    assert server.asked == []
    monkeypatch.chdir(tmp_path)
    Path("RN50").mkdir()
    assert parse_name("RN50") is None  # a folder of that name goes first


def test_every_pair_has_its_place():
    places = repositories.repositories()
    assert sum(map(len, places.values())) == 169
    for model, tag in clip_jax.list_pretrained():
        name = parse_name(f"{model}:{tag}")
        assert name.pretrained == tag and bool(name.repository) != bool(name.address)
    addresses = {p for tags in places.values() for p in tags.values() if p.startswith("http")}
    assert len(addresses) == 1  # every other place is on the hub
    for name in repositories.OPENAI_SHA256:
        assert name in clip_jax.list_models()
        assert parse_name(name).address == repositories.openai_address(name)
    assert repositories.openai_address("ViT-L/14@336px").endswith("/ViT-L-14-336px.pt")


@pytest.fixture
def tiny_pair(server, monkeypatch):
    """A pair of the registry that is as small as the golden files."""
    config = read_checkpoint(GOLDEN / "open_clip").config
    for name, activation in (("Tiny", "gelu"), ("Tiny-quickgelu", "quick_gelu")):
        vision = dataclasses.replace(config.vision, activation=activation)
        text = dataclasses.replace(config.text, activation=activation)
        monkeypatch.setitem(zoo.MODELS, name, dataclasses.replace(config, vision=vision, text=text))
    monkeypatch.setitem(tags.TAGS, "Tiny", "plain quick*")
    places = {"plain": "me/model", "quick": "me/model/weights.bin"}
    monkeypatch.setattr(by_name, "repositories", lambda: {"Tiny": places})
    monkeypatch.setitem(by_name.TOKENIZER_REPOSITORIES, "Tiny", "me/words")
    server.repos["me/words"] = Repo({"README.md": b"no tokenizer"})


def test_a_pair_binds_its_activation(server, tiny_pair):
    del server.repos["me/model"].files["open_clip_config.json"]  # it is not asked for
    plain = read_model("Tiny:plain")
    assert plain.config.text.activation == plain.config.vision.activation == "gelu"
    assert plain.name == "Tiny"
    server.repos["me/model"].files["weights.safetensors"] = weights(server)
    quick = read_model("Tiny:quick")
    assert quick.config.text.activation == "quick_gelu" and quick.name == "Tiny-quickgelu"
    assert read_model("Tiny-quickgelu:quick").config == quick.config
    refuses("Tiny-quickgelu:plain cannot be loaded", "Tiny-quickgelu:plain")
    del server.repos["me/model"].files["open_clip_model.safetensors"]
    refuses("has no weights: none of open_clip_model.safetensors", "Tiny:plain")


def test_a_pairs_tokenizer_may_lie_elsewhere(server, tiny_pair, monkeypatch):
    monkeypatch.setattr(by_name, "tokenizer_family", lambda config: "metaclip2")
    monkeypatch.setattr("clip_jax.pretrained.load.tokenizer_family", lambda config: "metaclip2")
    folder = Path(constants.HF_HOME)
    folder.mkdir()
    train_sentencepiece(["a dog", "two cats and a dog", "red hat"] * 9, folder / "x.model", 273)
    server.repos["me/words"] = Repo({"tokenizer.model": (folder / "x.model").read_bytes()})
    spec = read_model("Tiny:plain").tokenizer
    assert spec.kind == "sentencepiece" and Path(spec.file).name == "tokenizer.model"


@pytest.fixture
def archive(server, monkeypatch):
    """OpenAI's server with one archive."""
    data = (GOLDEN / "openai" / "model.pt").read_bytes()
    sha = hashlib.sha256(data).hexdigest()
    monkeypatch.setattr(repositories, "OPENAI_ADDRESS", f"{server.address}/clip/models")
    monkeypatch.setitem(repositories.OPENAI_SHA256, "RN50", sha)
    server.plain[f"/clip/models/{sha}/RN50.pt"] = data
    return f"/clip/models/{sha}/RN50.pt"


def test_openais_archive_by_its_address(server, archive, capsys):
    loaded = read_model("RN50")
    assert_same(loaded, read_checkpoint(GOLDEN / "openai" / "model.pt"))
    assert loaded.name == "RN50" and "fetching RN50: RN50.pt, " in capsys.readouterr().err
    asked = len(server.asked)
    read_model("RN50")
    assert len(server.asked) == asked


def test_openais_archive_that_another_program_has_fetched(server, archive, tmp_path):
    (tmp_path / ".cache" / "clip").mkdir(parents=True)
    (tmp_path / ".cache" / "clip" / "RN50.pt").write_bytes(server.plain[archive])
    read_model("RN50")
    assert server.asked == []
    (tmp_path / ".cache" / "clip" / "RN50.pt").write_bytes(b"another")
    read_model("RN50")
    assert len(server.paths()) == 1


@pytest.mark.parametrize("kind", ["changed", "gone", "refused", "cut", "no length"])
def test_faults_of_openais_server(server, archive, kind):
    data = server.plain[archive]
    if kind == "changed":
        server.plain[archive] = data[:-1] + b"?"
        refuses("is not what was published", "RN50")
        assert list((Path(constants.HF_HOME) / "clip").glob("*.pt*")) == [
            Path(constants.HF_HOME) / "clip" / "RN50.pt.lock"
        ]
    elif kind == "gone":
        del server.plain[archive]
        refuses("RN50: .* does not exist", "RN50")
    elif kind == "refused":
        server.faults.append(fault("RN50", answers(503)))
        refuses("RN50: http.* answers 503", "RN50")
    elif kind == "cut":
        server.faults.append(fault("GET .*RN50", sends(data, 30_000), 1))
        read_model("RN50")
        assert server.asked[-1][1]["Range"] == "bytes=30000-"
    else:
        server.faults += [
            fault("HEAD", sends(b"", 0, length=0)),
            fault("GET", sends(data, 30_000, length=len(data)), 1),
            fault("GET", sends(data, len(data), length=0), 1),
        ]
        read_model("RN50")


LISTING, RESOLVE, BODY = "GET /api/models", "GET /me/model/resolve", "GET /cdn/"


def of_weights(make):
    """Return a fault whose action needs the weights' bytes."""
    return lambda server: make(weights(server))


RECOVERED = {
    "the listing is refused twice": [fault(LISTING, answers(503), 2)],
    "the listing hangs up once": [fault(LISTING, hangs_up, 1)],
    "too many requests, twice": [fault(RESOLVE, answers(429, Retry_After="0"), 2)],
    "a bad gateway once": [fault(BODY, answers(502), 1)],
    "a request time-out once": [fault(BODY, answers(408), 1)],
    "no answer once": [fault(BODY, hangs_up, 1)],
    "cut in the middle": of_weights(lambda data: [fault(BODY, sends(data, 50_000), 1)]),
    "cut in the middle, without a length": of_weights(
        lambda data: [fault(BODY, sends(data, 50_000, length=0), 1)]
    ),
    "too few bytes announced": of_weights(
        lambda data: [fault(BODY, sends(data, 50_000, length=50_000), 1)]
    ),
    "cut, then the range is not heard": of_weights(
        lambda data: [fault(BODY, sends(data, 50_000), 1), fault(BODY, sends(data, len(data)), 1)]
    ),
    "cut, then another range comes": of_weights(
        lambda data: [
            fault(BODY, sends(data, 50_000), 1),
            fault(
                BODY,
                sends(data[9:], 50, code=206, headers={"Content-Range": f"bytes 9-{len(data)}/*"}),
                1,
            ),
        ]
    ),
    "cut, then there is no such range": of_weights(
        lambda data: [fault(BODY, sends(data, 50_000), 1), fault(BODY, answers(416), 1)]
    ),
    "cut ten times": of_weights(
        lambda data: [
            fault(
                BODY,
                sends(
                    data[i * 9000 :],
                    9000,
                    code=206 if i else 200,
                    headers={"Content-Range": f"bytes {i * 9000}-/*"} if i else None,
                ),
                1,
            )
            for i in range(10)
        ]
    ),
    "silent in the middle": of_weights(
        lambda data: [fault(BODY, sends(data, 50_000, hold=True), 1)]
    ),
}


@pytest.mark.parametrize("case", RECOVERED)
def test_faults_that_are_recovered(server, monkeypatch, case):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    faults = RECOVERED[case]
    server.faults += faults(server) if callable(faults) else faults
    assert_same(read_model(NAME), read_checkpoint(GOLDEN / "open_clip"))


REFUSED = {
    "a server error": ([fault(LISTING, answers(500))], "answers 500; try again later"),
    "too many requests": ([fault(LISTING, answers(429))], "too many requests from here: wait"),
    "no listing": ([fault(LISTING, sends(b"<html>", 6))], "could not be fetched whole"),
    "an empty listing": ([fault(LISTING, sends(b"{}", 2))], "no listing"),
    "a list for a listing": ([fault(LISTING, sends(b"[1]", 3))], "no listing"),
    "no answer": ([fault(LISTING, hangs_up)], "does not answer"),
    "a silent hub": ([fault(LISTING, sends(b"", 0, length=9, hold=True))], "does not answer"),
    "a forbidden listing": ([fault(LISTING, answers(403))], "does not allow it: log in"),
    "a file that is gone": ([fault(RESOLVE, answers(404))], "does not exist"),
    "a file that is forbidden": ([fault(RESOLVE, answers(403))], "does not allow it"),
    "a body that is refused": ([fault(BODY, answers(500))], "answers 500"),
    "a body that never comes": ([fault(BODY, hangs_up)], "the next call goes on"),
    "too many bytes": ([fault(BODY, sends(b"x" * 200_000, 200_000))], "sends more than the 108"),
    "other bytes": (
        of_weights(lambda data: [fault(BODY, sends(data[:-1] + b"?", len(data)))]),
        "is not what was published",
    ),
    "compressed bytes": (
        of_weights(
            lambda data: [fault(BODY, sends(b"\x1f\x8b" + data[2:], len(data)))],
        ),
        "is not what was published",
    ),
    "a host that is not there": (
        [fault(RESOLVE, answers(302, Location="http://127.0.0.1:9/x"))],
        "could not be fetched whole|does not answer",
    ),
    "redirected in a circle": (
        lambda server: [fault(BODY, answers(302, Location=f"{server.cdn}/cdn/0"))],
        "redirect",
    ),
    "no hub behind the address": (
        [fault("HEAD /me/model", answers(200, ETag="x"))],
        "does not answer as a hub does",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_faults_that_are_one_line(server, monkeypatch, case):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1.0)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    faults, message = REFUSED[case]
    server.faults += faults(server) if callable(faults) else faults
    refuses(message)
    snapshots = cache() / "snapshots"
    assert not list(snapshots.glob("*/*.safetensors"))
    # Once it works again, the next call has it.
    server.faults.clear()
    assert_same(read_model(NAME), read_checkpoint(GOLDEN / "open_clip"))


def test_who_may_read_what(server, monkeypatch):
    refuses("knows no such repository, or it is private", "hf-hub:me/typo")
    refuses("no such revision", f"{NAME}@v9")
    server.repos["me/model"].token = "secret"
    refuses("or it is private: correct the name, or log in")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    refuses("refuses the token: log in")
    monkeypatch.setenv("HF_TOKEN", "secret")
    server.repos["me/model"].gated = True
    refuses(f"accept its conditions: do so at {server.address}/me/model, then log in")
    server.repos["me/empty"] = Repo({"README.md": b"none"})
    refuses("holds no model that can be read here", "hf-hub:me/empty")
    server.repos["me/bert"] = Repo(
        {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x"}
    )
    refuses("holds no model that can be read here", "hf-hub:me/bert")


def test_offline_the_cache_is_enough(server, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refuses("is not in .*HF_HUB_OFFLINE forbids to fetch it")
    refuses("HF_HUB_OFFLINE forbids to fetch it", "RN50")
    assert server.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    online = read_model(NAME)
    asked = len(server.asked)
    capsys.readouterr()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(read_model(NAME), online)
    assert len(server.asked) == asked and capsys.readouterr().err == ""


def test_a_hub_that_is_down_is_told_and_the_cache_taken(server, monkeypatch, capsys):
    online = read_model(NAME)
    capsys.readouterr()
    point_to(monkeypatch, "http://127.0.0.1:9")
    assert_same(read_model(NAME), online)
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not answer" in line and line.endswith("taking what is in the cache")


def test_a_cache_that_lacks_a_file_says_so_offline(server, monkeypatch):
    read_model(NAME)
    (cache() / "snapshots" / server.repos["me/model"].commit / "open_clip_config.json").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refuses("holds no model that can be read here")


def test_no_room(server, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refuses("has 0.0 GB free and 0.0 GB are to come: make room, or let HF_HOME name")


def test_a_write_that_fails(server, monkeypatch):
    import errno

    def write(self, chunk):
        raise self._failed(OSError(errno.ENOSPC, "No space left on device"))

    with monkeypatch.context() as patch:
        patch.setattr(download._GrowingFile, "write", write)
        refuses(r"cannot be written \(No space left on device\): make room")
    read_model(NAME)


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "home").write_text("a file in its place")
    refuses("cannot be written .*let HF_HOME name another folder")


@pytest.mark.parametrize("left", ["whole", "damaged", "too long"])
def test_what_an_earlier_call_left(server, left):
    data = weights(server)
    partial_of(data).parent.mkdir(parents=True)
    content = {"whole": data, "damaged": b"?" + data[1:50_000], "too long": data + b"x"}[left]
    partial_of(data).write_bytes(content)
    assert_same(read_model(NAME), read_checkpoint(GOLDEN / "open_clip"))
    assert len(server.bodies()) == {"whole": 0, "damaged": 2, "too long": 1}[left]


FETCH = (
    "from clip_jax.pretrained import hub; r = hub.open_repository('me/model');"
    "print(hub.fetch_files(r, ['weights.safetensors']))"
)


def start(server, home: Path) -> subprocess.Popen:
    """Fetch a file in a process of its own, by the hub's own environment variables."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.address,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(TESTS.parent),
    }
    return subprocess.Popen(
        [sys.executable, "-c", FETCH], env=environment, stdout=subprocess.PIPE, text=True
    )


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_at_five_points_the_next_call_finishes_it(server, tmp_path):
    data = np.random.default_rng(0).bytes(1_200_000)
    server.repos["me/model"].files["weights.safetensors"] = data
    home = tmp_path / "own"
    partial = home / "hub" / "models--me--model" / "blobs"
    partial /= hashlib.sha256(data).hexdigest() + PARTIAL
    ranges = []
    for i in range(1, 6):
        point = i * 200_000
        begin = point - 200_000
        part = {"code": 206, "headers": {"Content-Range": f"bytes {begin}-/*"}} if begin else {}
        server.faults[:] = [fault(BODY, sends(data[begin:], 200_000, hold=True, **part))]
        child = start(server, home)
        wait_for(lambda point=point: partial.exists() and partial.stat().st_size == point)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
        ranges.append(server.asked[-1][1].get("Range"))
    server.faults.clear()
    with start(server, home) as child:
        folder = Path(child.communicate()[0].strip())
    assert (folder / "weights.safetensors").read_bytes() == data and not partial.exists()
    assert ranges == [None, *(f"bytes={i * 200_000}-" for i in range(1, 5))]
    assert dict(server.asked)[server.asked[-1][0]]  # the last one asked for the rest alone
    assert [h.get("Range") for line, h in server.asked if "/cdn/" in line][-1] == "bytes=1000000-"


def test_two_processes_write_one_file(server, tmp_path):
    data = np.random.default_rng(0).bytes(1_200_000)
    server.repos["me/model"].files["weights.safetensors"] = data
    slow = functools.partial(time.sleep, 1.5)
    server.faults.append(lambda handler: "/cdn/" in handler.path and slow())
    children = [start(server, tmp_path / "own") for _ in range(2)]
    folders = {child.communicate()[0].strip() for child in children}
    assert [child.returncode for child in children] == [0, 0] and len(folders) == 1
    assert (Path(folders.pop()) / "weights.safetensors").read_bytes() == data
    assert len(server.bodies()) == 1


# Of the hub's own code, about its own HTTP library.
HUBS_OWN_WARNING = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")


@pytest.fixture
def writer(server, monkeypatch):
    """Somebody who is logged in and has a run that was evaluated."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return server


def evaluated_run(folder: Path, scale: float) -> Path:
    """Write a work folder of the golden model, and an evaluation of a model of this scale."""
    convert(str(GOLDEN / "open_clip"), str(folder))
    row = {
        "dataset": "pets.tar",
        "task": "zeroshot_classification",
        "metrics": {"acc1": 0.5, "calibration_error": None},
        "intervals": {"acc1": [0.4, 0.6]},
        "images": 1234,
    }
    (folder / "eval.json").write_text(json.dumps({"results": [row], "scale": scale}))
    return folder


@HUBS_OWN_WARNING
@pytest.mark.parametrize("to", ["own", "open_clip", "hf"])
def test_a_run_is_uploaded_with_its_card_and_loaded_again(writer, tmp_path, to):
    scale = clip_jax.load(GOLDEN / "open_clip").scale
    run = evaluated_run(tmp_path / "run", scale if to == "own" else 2 * scale)
    converted = convert(str(run), "hf-hub:me/mine", to=to, private=True)
    assert converted.place == f"{writer.address}/me/mine"
    loaded = read_model("hf-hub:me/mine")
    assert loaded.name == ("open_clip" if to == "own" else "mine")  # what its config says
    assert_same(loaded, read_checkpoint(GOLDEN / "open_clip"))
    assert [h for line, h in writer.asked if "create" in line]
    card = writer.repos["me/mine"].files["README.md"].decode()
    assert 'clip_jax.load("hf-hub:me/mine")' in card
    line = "| zeroshot_classification | pets.tar | 1,234 | acc1 | 50.00 % | 40.0 to 60.0 |"
    assert (line in card) == (to == "own")  # a table of other weights is left out
    with pytest.raises(UserError, match="holds something already"):
        convert(str(run), "hf-hub:me/mine")


@HUBS_OWN_WARNING
def test_uploads_that_are_refused(server, writer, tmp_path, monkeypatch):
    golden = str(GOLDEN / "open_clip")

    def refused(message, name="me/mine"):
        with pytest.raises(UserError, match=message) as raised:
            convert(golden, f"hf-hub:{name}")
        assert "\n" not in str(raised.value)

    monkeypatch.setenv("HF_TOKEN", "wrong")
    refused("refuses the token")
    monkeypatch.delenv("HF_TOKEN")
    refused("nobody is logged in: log in with")
    monkeypatch.setenv("HF_TOKEN", "secret")
    refused("me/model holds something already", "me/model")
    refused("hf-hub:a/b/c was not uploaded", "a/b/c")
    for path, code, message in (
        ("repos/create", 403, "your token may not write there"),
        ("/store/", 500, "answers 500"),
        ("/commit/", 503, "answers 503"),
    ):
        server.faults[:] = [fault(path, answers(code))]
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        refused(message)
