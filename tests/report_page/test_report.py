"""Test the report page: what it shows, and how it looks in a browser."""

import importlib.util
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import CHROMIUM, probe
from data_cases import ToyTokenizer, write_shards
from hypothesis import given
from hypothesis import strategies as st

from clip_jax.errors import UserError
from clip_jax.evaluation.encoders import Encoders
from clip_jax.evaluation.run import run_evaluation
from clip_jax.evaluation.spec import EvalSpec
from clip_jax.report_page.select_examples import UMAP_NEIGHBORS, flatten
from clip_jax.report_page.svg import line_chart, log_ticks, ticks
from clip_jax.sections import EvalSection
from clip_jax.tools.report import report, report_text

SIDE = 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Write two work folders with metrics and an evaluation, and their data."""
    root = tmp_path_factory.mktemp("report")
    write_shards(root, [30], side=SIDE)
    (root / "names.txt").write_text("".join(f"<name> & {i}\n" for i in range(7)))
    section = EvalSection(
        data=str(root), classnames=str(root / "names.txt"), templates=("{}",),
        ablate=("{}", "a {}"), batch_size=8,
    )  # fmt: skip
    for seed, name in enumerate(("one", "two")):
        rng = np.random.default_rng(seed)
        pixels, words = rng.normal(size=(SIDE * SIDE * 3, 8)), rng.normal(size=(100, 8))

        def image(images, pixels=pixels):
            return (images.reshape(len(images), -1) / 255.0) @ pixels

        def text(tokens, words=words):
            return (words[tokens] * (tokens > 0)[..., None]).sum(axis=1)

        encoders = Encoders(
            image, text, ToyTokenizer(), image_size=SIDE, context_length=16, embed_dim=8,
            scale=100.0, name="toy", identity=name,
        )  # fmt: skip
        folder = root / name
        folder.mkdir()
        lines = [{"step": s, "loss": 5 / (s + 1), "scale": 14.0 + s} for s in range(1, 40)]
        lines[7]["loss"] = "NaN"
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        run_evaluation(encoders, EvalSpec.from_section(section), folder=folder, progress=False)
    return root


class Page(HTMLParser):
    """A parser that checks that tags close in order, and keeps headings and addresses."""

    def __init__(self, html):
        super().__init__()
        self.open, self.headings, self.addresses = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_the_page_is_whole_and_asks_nothing_of_the_network(runs):
    written = report([runs / "one", runs / "two"])
    html = (runs / "one" / "report.html").read_text()
    assert written.path == runs / "one" / "report.html"
    assert written.size == len(html.encode()) and str(written.path) in report_text(written)
    page = Page(html)
    assert not page.open
    wanted = ["Results", "Training", "Calibration", "Prompts"]
    for name in ("one", "two"):
        for part in ("Worst classes", "One batch", "Found by words", "Map"):
            wanted.append(f"{part} ({name})")
    assert set(wanted) <= set(page.headings)
    assert page.addresses and all(a.startswith("data:") for a in page.addresses)
    assert "<name>" not in html and "&lt;name&gt; &amp; 0" in html
    # The figures of eval.json are those of the table.
    results = json.loads((runs / "two" / "eval.json").read_text())["results"]
    for value in results[0]["metrics"].values():
        assert f"{100 * value:.2f}" in html


def test_a_page_without_data_or_without_training(runs, tmp_path):
    shutil.copytree(runs / "one", tmp_path / "moved")
    (tmp_path / "moved" / "metrics.jsonl").unlink()
    values = json.loads((tmp_path / "moved" / "eval.json").read_text())
    values["request"]["data"] = str(tmp_path / "gone.tar")
    (tmp_path / "moved" / "eval.json").write_text(json.dumps(values))
    report([tmp_path / "moved"], tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert "Training" not in page.headings and "Found by words" in page.headings
    with pytest.raises(UserError, match=r"no metrics\.jsonl and no eval\.json"):
        report([tmp_path])
    (tmp_path / "moved" / "eval.json").write_text('{"results": [')
    with pytest.raises(UserError, match="is damaged"):
        report([tmp_path / "moved"])


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_ticks_span_the_numbers_and_are_few(a, b):
    low, high = min(a, b), max(a, b)
    values = ticks(low, high)
    span = values[-1] - values[0]
    assert values == sorted(set(values)) and 2 <= len(values) <= 8
    # An end that is nearer than that to a tick is at the tick, on a page.
    assert values[0] <= low + 1e-6 * span and values[-1] >= high - 1e-6 * span


def test_a_curve_has_a_gap_where_a_number_is_not_finite():
    points = [(float(x), x if x != 3 else float("nan")) for x in range(7)]
    chart = line_chart([("a & b", points)], x_label="step", y_label="loss")
    assert chart.count('class="line c0"') == 2 and "a &amp; b" in chart
    assert line_chart([("a", [(0.0, float("nan"))])], x_label="", y_label="") == ""
    assert log_ticks(1.5, 8) == [1, 2, 5, 10]


# Writes what the probe finds into the page's title.
PROBE = f"""<script>addEventListener("load", () => {{
  const probe = {probe("section, .shot, .miss, figure, .query, td.cell")};
  document.title = JSON.stringify(probe());
}});</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1200, 500])
def test_nothing_overlaps_in_a_browser(runs, tmp_path, width):
    report([runs / "one", runs / "two"], tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text().replace("</body>", PROBE + "</body>")
    (tmp_path / "page.html").write_text(html)
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
         "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    probed = json.loads(re.search("<title>(.*?)</title>", done.stdout).group(1))
    assert probed["boxes"] > 50 and probed["wrong"] == []


def test_a_plane_is_mapped_as_it_is():
    rng = np.random.default_rng(0)
    plane_B2 = rng.normal(size=(UMAP_NEIGHBORS, 2)) * [3, 1]
    z_BD = plane_B2 @ np.linalg.qr(rng.normal(size=(8, 2)))[0].T
    about, flat_B2 = flatten(z_BD.astype(np.float32))
    assert "PCA, 100%" in about

    def distances(x):
        return np.linalg.norm(x[:, None] - x, axis=-1)

    # float32 features of size 3.
    np.testing.assert_allclose(distances(flat_B2), distances(plane_B2), atol=1e-5)


def test_the_map_is_umaps_where_it_is_installed():
    if importlib.util.find_spec("umap") is None:
        pytest.skip("umap-learn is not installed")
    rng = np.random.default_rng(0)
    sides_B = np.arange(40) % 2
    z_BD = np.float32(rng.normal(size=(40, 8)) * 0.1 + 4 * sides_B[:, None])
    about, flat_B2 = flatten(z_BD)
    assert about.startswith("UMAP") and flat_B2.shape == (40, 2)
