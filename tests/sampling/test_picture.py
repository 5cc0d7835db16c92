"""Contact sheets: every image where it belongs, in a size that can be told, with readable text that fits."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from selfnpo.sampling.picture import TALLEST, WIDEST, Sheet, save_comparison, save_table
from selfnpo.sampling.text import ELLIPSIS, font, shorten, wrap


def flat(colors, size):
    """Images of one color each, `[n, 3, *size]`, of bytes."""
    return (torch.tensor(colors)[:, :, None, None] / 127.5 - 1).expand(-1, -1, *size)


def shown(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")), image.text


def colors_of(picture):
    """The colors that are no gray, in reading order of their first pixels."""
    pixels = picture.reshape(-1, 3)
    colorful = pixels[np.ptp(pixels.astype(int), axis=1) > 30]
    return list(dict.fromkeys(map(tuple, colorful.tolist())))


def test_images_keep_their_places_and_pixels(tmp_path):
    left = [(250, 0, 10 * i) for i in range(6)]
    right = [(0, 250, 10 * i) for i in range(6)]
    panels = [("one", flat(left, (64, 64))), ("other", flat(right, (64, 64)))]
    save_comparison(tmp_path / "x.png", panels, 3, "caption", [*"abcdef"], {"selfnpo": "{}"})
    picture, text = shown(tmp_path / "x.png")
    assert text["selfnpo"] == "{}"
    assert colors_of(picture) == [*left[:3], *right[:3], *left[3:], *right[3:]]
    side = Sheet((64, 64), 6, 3, 2, 1).size[0]
    assert side % 64 == 0  # sharp: enlarged by a whole number
    for color in left + right:
        assert (picture == color).all(2).sum() == side**2


def test_large_images_are_reduced_by_a_whole_number_and_the_picture_says_so():
    sheet = Sheet((1024, 1024), 8, 4, 2, 1)
    assert sheet.size == (512, 512)
    assert "images reduced from 1024x1024 to 512x512 pixels" in sheet.caption("")
    assert Sheet((512, 512), 8, 4, 2, 1).size == (512, 512)
    assert "reduced" not in Sheet((512, 512), 8, 4, 2, 1).caption("")
    for sheet in (Sheet((720, 480), 1000, 10, 2, 1), Sheet((8, 8), 1000, 10, 4, 9), Sheet((2048, 2048), 1, 1, 2, 1)):
        height, width = sheet.size
        assert sheet.across * sheet.columns * width <= WIDEST
        assert sheet.down * sheet.rows * height <= TALLEST


@pytest.mark.parametrize("labels", [("a cat", "a dog"), ("a dog",) * 2, (), ("", "")])
def test_where_prompts_stand(labels):
    sheet = Sheet((64, 64), 8, 4, 2, 1, tuple(labels[i % 2] for i in range(8)) if labels else ())
    assert sheet.by_column
    assert bool(sheet.strip) == (len(set(labels)) > 1)
    assert ("“a dog”" in sheet.caption("")) == (set(labels) == {"a dog"})  # one for all stands below the picture


def test_prompts_that_change_along_a_column_stand_below_each_image(tmp_path):
    six = Sheet((64, 64), 6, 4, 2, 1, tuple("abcdef"))
    assert not six.by_column
    images = flat([(250, 0, 0)] * 6, (64, 64))
    below, above = six.panel(images).height, Sheet((64, 64), 6, 4, 2, 1, tuple("abcdab")).panel(images).height
    assert below == above + six.strip


def test_frames_of_a_video_share_a_prompt():
    sheet = Sheet((48, 72), 8, 4, 2, 1, ("one", "two"))
    assert sheet.frames == 4
    assert not sheet.by_column
    assert sheet.label_lines == [["one"], ["two"]]


def test_text_fits():
    letters = font(20)
    long = "photographed with a very long lens " * 20
    assert shorten("short", letters, 100) == "short"
    cut = shorten(long, letters, 300)
    assert cut.endswith(ELLIPSIS)
    assert 250 < letters.getlength(cut) <= 300
    lines = wrap(long, letters, 300, 3)
    assert len(lines) == 3
    assert lines[-1].endswith(ELLIPSIS)
    assert all(letters.getlength(line) <= 300 for line in lines)
    assert "".join(lines[:2]).replace(" ", "") in long.replace(" ", "")
    assert wrap("x" * 500, letters, 300, 2)[0].endswith(ELLIPSIS)
    assert wrap("", letters, 300, 2) == wrap("  \n ", letters, 300, 2) == []
    assert wrap("two words", letters, 300, 2) == ["two words"]
    assert wrap("two words", letters, 60, 2) == ["two", "words"]


def test_long_prompts_do_not_widen_the_picture(tmp_path):
    images = flat([(250, 0, 0), (0, 250, 0)], (32, 32))
    sizes = set()
    for prompt in ("a cat", "Ein sehr langer Text über Käfer und Bären " * 50):
        save_table(tmp_path / "x.png", [[images] * 3] * 2, ["r 1", "r 2"], [*"abc"], 2, "c", [prompt, "b"])
        sizes.add(shown(tmp_path / "x.png")[0].shape[1])
    assert len(sizes) == 1


def test_a_table_has_its_cells_in_order(tmp_path):
    cells = [[flat([(250, 50 * row, 60 * column)], (8, 8)) for column in range(3)] for row in range(2)]
    save_table(tmp_path / "x.png", cells, ["guidance_scale\n2", "guidance_scale\n3"], ["a", "b", "c"], 1, "caption")
    picture, _ = shown(tmp_path / "x.png")
    assert colors_of(picture) == [(250, 50 * row, 60 * column) for row in range(2) for column in range(3)]


def test_metadata_of_any_language(tmp_path):
    text = {"selfnpo": json.dumps({"prompt": "кот 猫 ü"}, ensure_ascii=False)}
    save_comparison(tmp_path / "x.png", [("a", flat([(1, 2, 3)], (8, 8)))], 1, "", text=text)
    assert shown(tmp_path / "x.png")[1] == text
