"""Sets that img2dataset itself wrote, with its lists and statistics beside them, read as they are.

The files are `make_img2dataset_files.py`'s. Sets by the webdataset and the TFDS libraries are made
and read in tests/data/test_formats.py, since those libraries are among the tests' own.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_cases import eval_loader, train_loader
from webdataset.tariterators import group_by_keys, tar_file_iterator

from clip_jax.data.dataset import open_sources
from clip_jax.data.images import decode_image
from clip_jax.data.sample_reader import SampleShape
from clip_jax.data.shards import Handles

transforms = pytest.importorskip("torchvision.transforms.functional")

GOLDEN = Path(__file__).parent.parent / "golden" / "img2dataset"
SHAPE = SampleShape(image_size=16, context_length=77)
# Of the twelve addresses these could be had; img2dataset's keys count every address, in shards of 7
# whose numbers begin anew: 000000 to 000006 and 000010 to 000014.
GOOD = [f"{k:06d}" for k in (0, 1, 2, 4, 5, 6, 10, 13, 14)]


def by_webdataset() -> dict[str, dict[str, bytes]]:
    """key -> members, as webdataset's own reader gives them."""
    samples = {}
    for path in sorted((GOLDEN / "webdataset").glob("*.tar")):
        with path.open("rb") as file:
            members = [m | {"__url__": str(path)} for m in tar_file_iterator(file)]
        samples |= {sample["__key__"]: sample for sample in group_by_keys(members)}
    return samples


@pytest.mark.parametrize("layout", ["webdataset", "files", "parquet"])
def test_every_layout_is_read_as_it_is(layout):
    ((*indexes,),) = open_sources(str(GOLDEN / layout))
    places = [(index, i) for index in indexes for i in range(len(index))]
    expected = by_webdataset()
    assert list(expected) == GOOD
    found = {}
    with eval_loader(indexes, batch_size=4, shape=SHAPE) as loader:
        for batch in loader:
            for row in np.flatnonzero(batch["valid"]):
                found[len(found)] = batch["captions"][row], batch["image"][row]
        # The rows of a Parquet file count what could not be had, too.
        lacking = {"no_image": 2, "empty_caption": 1}
        assert loader.skipped == (lacking if layout == "parquet" else {})
    assert len(found) == len(GOOD)
    with Handles() as handles:
        records = [index.record(i, handles) for index, i in places]
    records = [record for record in records if record["status"] == "success"]
    for (captions, image_HWC), record, sample in zip(
        found.values(), records, expected.values(), strict=True
    ):
        assert captions == sample["txt"].decode().splitlines()
        assert record["key"] == sample["__key__"]
        assert record["similarity"] == json.loads(sample["json"])["similarity"]
        picture = decode_image(sample["jpg"])
        reference = transforms.center_crop(
            transforms.resize(picture, 16, interpolation=3), 16
        ).convert("RGB")
        np.testing.assert_array_equal(image_HWC, np.asarray(reference))


@pytest.mark.parametrize("layout", ["webdataset", "files", "parquet"])
def test_it_is_trained_on_with_a_filter_over_its_fields(layout):
    ((*indexes,),) = open_sources(str(GOLDEN / layout), where="similarity>=0.4,status==success")
    keys: Counter[str] = Counter()
    section = {"streams": 2, "threads": 0, "repeat": False}
    with train_loader(indexes, batch_size=4, shape=SHAPE, seed=1, **section) as loader:
        for batch in loader:
            keys.update(k for k, valid in zip(batch["key"], batch["valid"], strict=True) if valid)
        assert not loader.skipped
    assert len(keys) == 6 and set(keys.values()) == {1}
    if layout == "webdataset":
        assert sorted(key.rpartition("/")[2] for key in keys) == GOOD[3:]
