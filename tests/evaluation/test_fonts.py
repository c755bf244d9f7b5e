"""Texts of a page are drawn in a font that has their characters, or the characters are named."""

import numpy as np
import pytest
from PIL import Image

from clip_jax.evaluation import fonts
from clip_jax.evaluation.plots import caption_grid, prediction_grid

IMAGE = np.zeros((8, 8, 3), np.uint8)


@pytest.fixture(autouse=True)
def brought_font(monkeypatch):
    """Leave the font that matplotlib brings alone, whatever the system has."""
    (first, *_) = fonts._font_files()
    monkeypatch.setattr(fonts, "_font_files", lambda: [first])
    return first


def test_a_text_of_the_built_in_font_needs_no_other(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fonts, "_font_files", lambda: pytest.fail("looked for"))
    font = fonts.PageFonts(["a cat", "caf\u0065"], 14)
    assert font._path_of("a cat") is None
    caption_grid([IMAGE], ["a cat\ufe0f of 20 %"], tmp_path / "a.png")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "text",
    [
        "\u0642\u0637\u0629",
        "\u043a\u043e\u0448\u043a\u0430",
        "\u017c\u00f3\u0142w",
        "\u03b3\u03ac\u03c4\u03b1",
    ],
)
def test_a_font_that_has_the_characters_is_taken(text, brought_font, tmp_path, capsys):
    assert fonts.PageFonts([text], 14)._path_of(text) == brought_font
    caption_grid([IMAGE], [text], tmp_path / "a.png")
    caption_grid([IMAGE], ["".join("\ue000" for _ in text)], tmp_path / "boxes.png")
    pages = [np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "boxes.png")]
    assert (pages[0] != pages[1]).any()
    assert "boxes" not in capsys.readouterr().err.partition("\n")[0]


def test_characters_that_no_font_has_are_named_in_one_line(tmp_path, capsys):
    path = tmp_path / "grid.png"
    prediction_grid([IMAGE], ["\u732b"], [[("\u72d7", 0.5), ("a dog", 0.25)]], path)
    (line,) = capsys.readouterr().err.splitlines()
    assert "no font of this machine has \u72d7 \u732b, and they are drawn as boxes" in line
    assert "fonts-noto-cjk" in line and path.exists()


def test_right_to_left_text_without_its_library_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fonts.features, "check", lambda name: False)
    caption_grid([IMAGE], ["\u0642\u0637\u0629"], tmp_path / "a.png")
    assert "drawn from left to right" in capsys.readouterr().err


def test_a_file_that_is_no_font_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(fonts, "_font_files", lambda: [str(tmp_path / "broken.ttf")])
    assert fonts.PageFonts(["\u732b"], 14)._path_of("\u732b") is None
