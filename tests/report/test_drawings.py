"""Drawings say what is run: their words are those of the prompts, and both of their files show the same."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from fake import profile as fake_profile
from PIL import Image

from vsr1.loop import hqr
from vsr1.loop.replies import REFINE
from vsr1.models import prompt_text
from vsr1.report import plots


def said(name):
    """The words of a drawing, in the order in which they stand in its file."""
    root = ElementTree.parse(plots.DRAWINGS / f"{name}.svg").getroot()
    texts = ("".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text"))
    return " ".join(" ".join(texts).replace("\u200b", "").split())


def shortened(prompt, words):
    """Whether a drawing has the beginning of a prompt, or all of it."""
    return " ".join(prompt.split())[:60] in words


def on_wrong_video(prompt):
    """What a prompt says about a video in which no scene fits."""
    return prompt[prompt.rindex("If no scene") :]


def test_drawings_ask_what_the_prompts_ask():
    for prompt in (prompt_text.SYSTEM_HQR, prompt_text.SYSTEM):
        assert prompt.partition(".")[0] in said("F2") and shortened(on_wrong_video(prompt), said("F2"))
    assert said("F2").count(REFINE) == 3 and REFINE in said("F3")
    lines = prompt_text.user_message("q1", "vt").split()
    assert " ".join(lines) in said("F3")


def test_the_rewriters_are_those_that_are_run():
    words = said("A1")
    seen = [hqr.rewrite_prompt(variant) for variant in ("blind", "seen", "reasoned")]
    assert words.count("in a call after") == sum(prompt == prompt_text.REWRITE for prompt, _ in seen) == 2
    assert words.count("none") == sum(not sees for _, sees in seen) + 2  # no video, no reasoning
    assert words.count("ours") == 3 and words.count(" ".join(prompt_text.REWRITE.split())) == 2
    assert " ".join(on_wrong_video(prompt_text.SYSTEM_HQR).split()) in words
    for way in ("replace", "append"):
        assert f"{way}: embed({hqr.compose_query('q1', 'TEXT', way)})" in words


@pytest.mark.parametrize("name", ["F2", "F3", "A1"])
def test_the_picture_has_the_shape_of_the_drawing(name):
    root = ElementTree.parse(plots.DRAWINGS / f"{name}.svg").getroot()
    size = [1.5 * float(root.get(side)) for side in ("width", "height")]
    with Image.open(plots.DRAWINGS / f"{name}.png") as picture:
        assert all(abs(a - b) <= 1 for a, b in zip(picture.size, size, strict=True))


def test_captions_have_the_numbers_of_the_profile_and_drawings_none(tmp_path, monkeypatch):
    run = replace(fake_profile(tmp_path, monkeypatch), n_soft=5, headline_turns=4)
    pictures = [path for path in plots.publish_drawings(run) if path.suffix == ".png"]
    captions = {path.stem: Image.open(path).text["Description"] for path in pictures}
    assert list(captions) == ["A1", "F2", "F3"] and "after turn T = 4" in captions["F3"]
    assert all("N = 5 soft tokens, T = 4 turns. Profile mini." in words for words in captions.values())
    assert not re.search(r"\d soft tokens|[NT] = \d", " ".join(map(said, captions)))
