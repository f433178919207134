"""Diagrams of the method, drawn from the parts that are run: `page` puts them into results/<profile>/figures/."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vsr1 import episode, gallery
from vsr1.params import Profile

TINT = {gallery.GREY: "#f2f2f2", gallery.BLUE: "#e3f0f8", gallery.ORANGE: "#fdf3dd", gallery.RED: "#fbe6d9"}


def publish(profile: Profile) -> list[Path]:
    """F3 in results/<profile>/figures/."""
    words = (
        "The loop as it is run here. Ours, beyond the paper's figure: a reply without a readable verdict goes on as "
        f"not matched; one without {episode.REFINE} ends the search; after look {profile.max_turns} the refined query "
        f"is searched with and its ranking recorded, but nobody looks. Profile {profile.name}."
    )
    return [gallery.save(pipeline(profile), profile.results() / "figures", "F3", words)]


@gallery.style()
def pipeline(profile: Profile) -> Figure:
    """F3: retrieve, verify, then ground or refine, with the ways a search ends."""
    figure = Figure(figsize=(9, 4.4))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 9), ylim=(0, 4.4))
    axes.set_axis_off()
    n, last = profile.n_soft, profile.max_turns
    _box(axes, (1.15, 3.5), (1.9, 0.8), "corpus\none vector a video", gallery.GREY)
    _box(axes, (1.15, 2.1), (1.9, 0.9), "search engine\n(frozen)", gallery.GREY)
    _box(axes, (1.15, 0.7), (1.9, 0.8), "query $q_1$", gallery.GREY)
    _box(axes, (3.5, 2.1), (1.3, 0.9), "top-1\nvideo $v_t$", gallery.GREY)
    _box(
        axes,
        (5.2, 2.1),
        (1.7, 0.9),
        "policy verifies\n<think> $r_t$ </think>\n<answer> $y_{ret}$",
        gallery.BLUE,
    )
    _box(
        axes, (7.9, 3.5), (1.9, 0.9), "ground: $y_{time}$\n<start> s </start>\n<end> e </end>", gallery.ORANGE
    )
    soft = f"refine (SQR)\n{episode.REFINE} → $q_{{soft}}$\n{n} soft tokens, {n} × D"
    _box(axes, (7.9, 2.1), (1.9, 0.9), soft, gallery.RED)
    _box(axes, (7.9, 0.7), (1.9, 0.8), f"end: no {episode.REFINE}\n(no_refine)", gallery.GREY)
    for start, end in (((1.15, 3.1), (1.15, 2.55)), ((1.15, 1.1), (1.15, 1.65)), ((2.1, 2.1), (2.85, 2.1))):
        _arrow(axes, start, end)
    _arrow(axes, (4.15, 2.1), (4.35, 2.1))
    _arrow(axes, (6.05, 2.55), (6.95, 3.4), "matched", (6.1, 3.1))
    _arrow(axes, (6.05, 2.1), (6.95, 2.1), "not matched,\nunknown", (6.52, 2.36))
    _arrow(axes, (7.9, 1.65), (7.9, 1.1), "without it", (8.35, 1.37))
    again = f"turn t + 1, while t < {last};  at t = {last}: searched, not looked at (budget)"
    _arrow(axes, (6.95, 1.65), (2.1, 1.65), again, (4.4, 0.85), gallery.RED, "arc3,rad=-0.2")
    return figure


def _box(axes, middle, size, words, colour):
    x, y = middle[0] - size[0] / 2, middle[1] - size[1] / 2
    face = {"facecolor": TINT[colour], "edgecolor": colour, "linewidth": 1.4}
    axes.add_patch(Rectangle((x, y), *size, **face))
    axes.text(*middle, words, ha="center", va="center", size=9)


def _arrow(axes, start, end, words="", at=(0, 0), colour=gallery.BLACK, bend="arc3"):
    line = {"arrowstyle": "->", "color": colour, "linestyle": "--" if colour == gallery.RED else "-"}
    axes.annotate("", end, start, arrowprops=line | {"connectionstyle": bend, "linewidth": 1.4})
    axes.text(*at, words, ha="center", va="center", size=8, color=colour)
