"""Draw the diagrams of the method from the texts that are run: two refinements (F2), the loop (F3), rewriters (A1).

templates/{F2,F3,A1}.yaml list their parts, filled with prompts and numbers of the profile. Coordinates are
inches. Boxes, arrows and texts are marked as such (gid), so that a test can hold them apart.
"""

import textwrap
from pathlib import Path

import yaml
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path as Line
from matplotlib.textpath import text_to_path

from vsr1.config import Profile
from vsr1.loop import hqr
from vsr1.loop.replies import REFINE
from vsr1.models import prompt_text
from vsr1.report import plots, results, templates

COLOURS = {
    "black": plots.BLACK,
    "orange": plots.ORANGE,
    "sky": plots.SKY,
    "blue": plots.BLUE,
    "red": plots.RED,
}
COLOURS |= {"grey": plots.GREY, "green": "#009e73", "yellow": "#f0e442", "pink": "#cc79a7"}
TINT = {"grey": "#f4f4f4", "blue": "#e6f1f8", "orange": "#fdf4e0", "red": "#fceae0", "black": "#ffffff"}
CHIPS = "orange sky green yellow blue red pink grey".split()
SIZE, STEP = 7.5, 0.15  # of the text in boxes, points; from line to line
NOT = "<answer>not_matched</answer>"


def publish(profile: Profile) -> list[Path]:
    """Write F2, F3 and A1 to results/<profile>/figures/."""
    written = []
    for name, figure in {"F2": hard_and_soft(profile), "F3": loop(profile), "A1": rewriters()}.items():
        caption = results.items()[name]["caption"].format(turns=profile.max_turns)
        words = f"{caption} Profile {profile.name}."
        written.append(plots.save(figure, profile.results() / "figures", name, words))
    return written


# --- What the diagrams are filled with


@plots.style()
def loop(profile: Profile) -> Figure:
    """Draw F3: retrieve, verify, then ground or refine, with the ways a search ends."""
    prompt = [
        *prompt_text.user_message("$q_1$", "$v_t$").splitlines(),
        "",
        ["<think> $r_t$ </think>", "blue"],
    ]
    prompt += [["<answer> $y_{ret}$ </answer>", "blue"]]
    return _draw("F3.yaml", n=profile.n_soft, turns=profile.max_turns, refine=REFINE, prompt=prompt)


@plots.style()
def hard_and_soft(profile: Profile) -> Figure:
    """Draw F2: the same query and video, then a rewritten query (a) or soft tokens (b)."""
    panels = [
        {"title": "(a) hard query refinement (HQR reasoned, ours)", "policy": "prompted"},
        {"title": "(b) soft query refinement (SQR)", "policy": "trained"},
    ]
    for panel, prompt in zip(panels, (prompt_text.SYSTEM_HQR, prompt_text.SYSTEM), strict=True):
        panel["prompt"] = _wrap(f"{prompt.partition('.')[0]}. … {_on_wrong_video(prompt)}", 3.8, 3)
    values = {"n": profile.n_soft, "end": 5.5 + min(0.18 * profile.n_soft, 1.6), "refine": REFINE}
    return _draw("F2.yaml", panels=panels, verdict=NOT, negatives=profile.sft_negatives or "all", **values)


@plots.style()
def rewriters() -> Figure:
    """Draw A1: what each variant of HQR is given, asked and answers."""
    variants = []
    for name in ("blind", "seen", "reasoned"):
        prompt, sees = hqr.rewrite_prompt(name)
        judges = prompt == prompt_text.SYSTEM_HQR
        asked = _wrap(f"… {_on_wrong_video(prompt)}" if judges else prompt, 2.23, 5)
        reply = [["<think> $r_t$ </think>", "black"], [NOT, "pink"]] if judges else []
        reply += [["<query_update>TEXT</query_update>", "black"]]
        variants.append({"name": name, "sees": sees, "judges": judges, "prompt": asked, "reply": reply})
    ways = [f"{way}: embed({hqr.compose_query('$q_1$', 'TEXT', way)})" for way in ("replace", "append")]
    return _draw("A1.yaml", variants=variants, ways="      ".join(ways))


def _on_wrong_video(prompt):
    """Return what a judge's prompt says on a wrong video."""
    return prompt[prompt.rindex("If no scene") :]


def _wrap(words, width, most):
    """Wrap words to at most `most` lines of at most `width` inches; an ellipsis for what is left out."""
    for letters in range(int(30 * width), 2, -1):
        lines = textwrap.wrap(words, letters, max_lines=most, placeholder=" …")
        if all(_inches(line) <= width for line in lines):
            return [line.replace("$", r"\$") for line in lines]


def _inches(words):
    """Return how long words are in a box; what is drawn differs by a few percent."""
    return 1.03 * text_to_path.get_text_width_height_descent(words, FontProperties(size=SIZE), False)[0] / 72


# --- Drawing


def _draw(template, width=9, **values):
    """Draw the parts that a template lists."""
    content = yaml.safe_load(templates.render(template, **values))
    figure = Figure(figsize=(width, content["height"]))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, content["height"]))
    axes.set_axis_off()
    for part in content["parts"]:
        kind = next(iter(part))
        place = part.pop(kind)
        PARTS[kind](axes, place, **part)
    return figure


def _box(axes, place, colour="grey", edge=None, dashed=False):
    """Draw a rounded box at (x, y, width, height)."""
    x, y, width, height = place
    props = {
        "facecolor": TINT[colour],
        "edgecolor": edge or COLOURS[colour],
        "linestyle": "--" if dashed else "-",
    }
    shape = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch((x, y), width, height, shape, linewidth=1.1, gid="box", **props))


def _card(axes, place, title, lines=(), **props):
    """Draw a box with a bold title and lines of words, or [words, colour], below it."""
    x, y, width, height = place
    _box(axes, place, **props)
    if lines:
        _text(axes, title, (x + 0.1, y + height - 0.09), size=8.5, weight="bold")
    else:  # a title alone stands in the middle
        middle = (x + width / 2, y + height / 2)
        _text(axes, title, middle, size=8.5, weight="bold", ha="center", va="center")
    for number, line in enumerate(lines):
        words, colour = (line, "black") if isinstance(line, str) else line
        _text(axes, words, (x + 0.1, y + height - 0.27 - STEP * number), colour=colour)


def _text(axes, words, at, size=SIZE, colour="black", **props):
    """Write words whose upper left corner is at (x, y)."""
    axes.text(*at, words, size=size, color=COLOURS[colour], **{"va": "top", "gid": "text"} | props)


def _arrow(axes, corners, colour="black", both=False):
    """Draw an arrow along corners; red ones, which lead back to the search, are dashed."""
    props = {"arrowstyle": "<|-|>" if both else "-|>", "mutation_scale": 9, "linewidth": 1.2}
    props |= {"color": COLOURS[colour], "linestyle": (0, (4, 2)) if colour == "red" else "-"}
    axes.add_patch(FancyArrowPatch(path=Line(corners), gid="arrow", **props))


def _chips(axes, at, n, width):
    """Draw N soft tokens in a row, at most `width` wide."""
    pitch = min(0.18, width / n)
    props = {"edgecolor": plots.BLACK, "linewidth": 4 * pitch, "gid": "chip", "zorder": 4}
    for number in range(n):
        corner, colour = (at[0] + pitch * number, at[1]), COLOURS[CHIPS[number % len(CHIPS)]]
        axes.add_patch(Rectangle(corner, 0.78 * pitch, 0.14, facecolor=colour, **props))


def _film(axes, place, count=3):
    """Draw frames side by side in a dark box."""
    x, y, width, height = place
    props = {"facecolor": "#333333", "edgecolor": plots.BLACK, "linewidth": 1.6, "gid": "box"}
    axes.add_patch(Rectangle((x, y), width, height, **props))
    rim, pitch = 0.12 * height, width / count
    for number in range(count):
        corner = x + pitch * (number + 0.06), y + rim
        axes.add_patch(Rectangle(corner, 0.88 * pitch, height - 2 * rim, facecolor="#dddddd"))


def _timeline(axes, place, span):
    """Draw a video as a bar, with a span (shares of its length) that has a start and an end."""
    x, y, width = place
    start, end = (x + width * share for share in span)
    axes.add_patch(Rectangle((x, y), width, 0.1, facecolor="#dddddd"))
    axes.add_patch(Rectangle((start, y), end - start, 0.1, facecolor=plots.ORANGE))
    for left, word in ((start, "start"), (end, "end")):
        axes.plot((left, left), (y - 0.05, y + 0.15), color=plots.BLACK, linewidth=1.2)
        _text(axes, word, (left, y - 0.08), ha="center")


PARTS = {"box": _box, "card": _card, "text": _text, "arrow": _arrow}
PARTS |= {"chips": _chips, "film": _film, "timeline": _timeline}
