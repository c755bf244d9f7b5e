"""The file of counts, and runs that read a shard only when they come to it."""

import json
from pathlib import Path

import data_cases
import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data.index import Entry, entry_of, read_index, write_index
from clip_jax.data.sources import index_shards
from clip_jax.errors import UserError

ENTRIES = st.builds(
    Entry,
    st.integers(0, 2**40),
    st.integers(0, 2**50),
    st.dictionaries(
        st.sampled_from(["no_image", "no_caption"]), st.tuples(st.integers(1, 99), st.text())
    ),
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(min_size=1), ENTRIES, max_size=5))
def test_what_is_written_is_read(tmp_path_factory, entries):
    folder = tmp_path_factory.mktemp("index")
    write_index(folder, entries)
    assert read_index(folder) == entries
    write_index("memory://bucket/x", entries)
    assert read_index("memory://bucket/x/") == entries
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_entries_of_read_shards(tmp_path):
    paths = data_cases.write_shards(tmp_path, [3, 2])
    entries = {
        Path(path).name: entry_of(s) for path, s in zip(paths, index_shards(paths), strict=True)
    }
    assert entries["s-00001.tar"] == Entry(2, Path(paths[1]).stat().st_size)
    write_index(tmp_path, entries)
    lines = (tmp_path / "index.json").read_text().splitlines()
    assert len(lines) == 3 and json.loads("".join(lines))["shards"]["s-00000.tar"][0] == 3


def test_webdatasets_sizes_are_read_where_there_is_no_index(tmp_path):
    (tmp_path / "sizes.json").write_text(json.dumps({"a.tar": 3, "b.tar": "4"}))
    assert read_index(tmp_path) == {"a.tar": Entry(3), "b.tar": Entry(4)}
    write_index(tmp_path, {"a.tar": Entry(5, 6)})
    assert read_index(tmp_path) == {"a.tar": Entry(5, 6)}


@pytest.mark.parametrize("text", ["[]", "{", '{"a.tar": {"width": 3}}', '{"a.tar": -1}', "\xff"])
def test_other_files_of_that_name_are_no_sizes(tmp_path, text):
    (tmp_path / "sizes.json").write_text(text, encoding="latin-1")
    assert read_index(tmp_path) == {}


def test_damaged_and_foreign_indexes(tmp_path):
    path = tmp_path / "index.json"
    write_index(tmp_path, {"a.tar": Entry(5, 6)})
    whole = path.read_text()
    for text in (whole[:-5], whole.replace("5", '"5"'), whole.replace("[5, 6]", "5")):
        path.write_text(text)
        with pytest.raises(UserError, match=r"index\.json is damaged"):
            read_index(tmp_path)
    path.write_text('{"weight_map": {}}')
    assert read_index(tmp_path) == {}
    with pytest.raises(UserError, match="another program's file"):
        write_index(tmp_path, {})
    assert path.read_text() == '{"weight_map": {}}'
