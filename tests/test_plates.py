"""Diagrams say what the profile runs, and nothing moves between two drawings."""

from dataclasses import replace

from fake import profile as fake_profile

from vsr1 import episode, plates


def test_the_pipeline_names_the_numbers_of_its_profile(tmp_path, monkeypatch):
    run = replace(fake_profile(tmp_path, monkeypatch), n_soft=5, max_turns=4)
    said = " ".join(text.get_text() for text in plates.pipeline(run).axes[0].texts)
    assert "5 soft tokens" in said and "at t = 4" in said and episode.REFINE in said


def test_no_word_leaves_the_pipeline_and_no_two_labels_overlap(tmp_path, monkeypatch):
    figure = plates.pipeline(fake_profile(tmp_path, monkeypatch))
    figure.draw_without_rendering()
    boxes = [t.get_window_extent() for t in figure.axes[0].texts if t.get_text()]
    assert all(figure.bbox.x0 <= b.x0 and b.x1 <= figure.bbox.x1 and b.y0 >= 0 for b in boxes)
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


def test_the_same_profile_gives_the_same_bytes(tmp_path, monkeypatch):
    run = fake_profile(tmp_path, monkeypatch)
    first = [path.with_suffix(kind).read_bytes() for path in plates.publish(run) for kind in (".png", ".svg")]
    again = [path.with_suffix(kind).read_bytes() for path in plates.publish(run) for kind in (".png", ".svg")]
    assert first == again and len(first) == 2
