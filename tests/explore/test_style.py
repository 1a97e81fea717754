"""One palette that colour-blind readers can use, and pictures whose description reaches a screen reader."""

import base64
import itertools
from html.parser import HTMLParser

import numpy as np
import pytest

from lecturekit.explore import style

# Machado, Oliveira and Fernandes (2009), severity 1, acting on linear RGB.
DEFICIENCIES = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


class Images(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.found.append(dict(attributes))


def linear(colour):
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """Linear RGB to CIELAB (D65), where a distance of about 2.3 is just noticeable."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ np.clip(rgb, 0, 1)
    f = np.cbrt(xyz / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_lines_differ_for_colour_blind_readers(deficiency):
    seen = {colour: lab(np.array(DEFICIENCIES[deficiency]) @ linear(colour)) for colour in style.CYCLE}
    nearest = min(np.linalg.norm(seen[a] - seen[b]) for a, b in itertools.combinations(seen, 2))
    assert nearest > 5  # twice a just noticeable difference; red and green of equal lightness would come out near 2


def test_notes_can_be_read_on_white():
    luminance = linear(style.GREY) @ np.array([0.2126, 0.7152, 0.0722])
    assert 1.05 / (luminance + 0.05) > 4.5  # WCAG 2.2, level AA


def test_alt_text_reaches_html_and_plain_text():
    fig, (axes,) = style.figure()
    axes.plot([0, 1], [0, 1])
    bundle = style.alt(fig, 'Loss "falls"\n   from 2 to 1 & stays <there>.')._repr_mimebundle_()
    (image,) = Images(bundle["text/html"]).found
    assert image["alt"] == 'Loss "falls" from 2 to 1 & stays <there>.'
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert "Loss" in bundle["text/plain"] and "<img" not in bundle["text/plain"]


def test_the_same_figure_gives_the_same_bytes():
    def draw():
        fig, (axes,) = style.figure()
        axes.plot([0, 1], [0, 1])
        return style.alt(fig, "A line.").png

    assert draw() == draw()


def test_a_figure_without_words_is_refused():
    fig, _ = style.figure()
    with pytest.raises(ValueError, match="text must say"):
        style.alt(fig, "  ")
    with pytest.raises(ValueError, match="rows must be"):
        style.figure(rows=0)


def test_figures_are_not_shown_twice_by_a_notebook():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    style.figure(2, 2)
    assert plt.get_fignums() == before


def test_heat_maps_survive_rubbish():
    fig, (left, right) = style.figure(1, 2)
    style.heat(left, np.full((3, 4), np.nan), "all NaN")
    style.heat(right, np.zeros((3, 4)), "all zero")
    assert style.alt(fig, "Two empty maps.").png
    with pytest.raises(ValueError, match="matrix"):
        style.heat(left, np.zeros(3), "a vector")


def test_text_is_large_enough_to_read():
    sizes = [value for name, value in style.SETTINGS.items() if name.endswith("size") and name != "lines.markersize"]
    assert len(sizes) >= 6 and min(sizes) >= 11
