"""Diagrams of the method, drawn from the parts that are run: the loop (F3), two refinements (F2), three rewriters (A1).

Coordinates are inches. Boxes, arrows and texts are marked as such (gid), so that a test can hold them apart.
"""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from matplotlib.path import Path as Line
from matplotlib.textpath import text_to_path

from vsr1.config import Profile
from vsr1.data import annotations, video_reader
from vsr1.loop import hqr, replies
from vsr1.loop.records import Episode
from vsr1.loop.replies import REFINE
from vsr1.models import prompt_text
from vsr1.report import plots, qualitative, results, search_figures
from vsr1.report.plots import BLACK, BLUE, GREY, ORANGE, RED, SKY

GREEN, YELLOW, PINK = "#009e73", "#f0e442", "#cc79a7"  # the rest of Okabe and Ito's colours
TINT = {GREY: "#f4f4f4", BLUE: "#e6f1f8", ORANGE: "#fdf4e0", RED: "#fceae0", BLACK: "#ffffff"}
CHIPS = (ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK, GREY)
SIZE, STEP = 7.5, 0.15  # of the text in boxes, points; from line to line
NOT = "<answer>not_matched</answer>"


def publish(profile: Profile) -> list[Path]:
    """F2, F3 and A1 in results/<profile>/figures/."""
    pair, folder = example(profile), profile.results() / "figures"
    rendered = bool(pair and profile.world)  # frames of real video stay out of results/
    words = {name: results.items()[name]["caption"] for name in ("F2", "F3", "A1")}
    words["F2"] += _example(pair, rendered)
    words["F3"] = words["F3"].format(turns=profile.max_turns)
    drawn = {"F2": hard_and_soft(profile, pair, films(profile, *pair) if rendered else {})}
    drawn |= {"F3": pipeline(profile), "A1": rewriters()}
    return [plots.save(drawn[key], folder, key, f"{words[key]} Profile {profile.name}.") for key in drawn]


def _example(pair, rendered):
    """What the caption of F2 says of its example."""
    if pair is None:
        return " Drawn without an example: no two searches satisfy the rule of F7 here."
    dataset, soft, hard = pair
    ranks = ", ".join(str(turn.rank_out or turn.rank_in) for turn in hard.turns)
    where = f"query {soft.desc_id} of {dataset}" + " (rendered video)" * rendered
    picked = f" Example: {where}, the first that satisfies the rule of F7."
    return f"{picked} HQR left the right video on rank {ranks}, turn by turn."


# --- F3


@plots.style()
def pipeline(profile: Profile) -> Figure:
    """F3: retrieve, verify, then ground or refine, with the ways a search ends."""
    figure, axes = _canvas(3.85)
    n, last = profile.n_soft, profile.max_turns
    _card(axes, (0.15, 2.95, 1.8, 0.75), GREY, "corpus", ["$V$: one vector a video"])
    for place in range(5):
        _film(axes, (0.25 + 0.33 * place, 3.05, 0.28, 0.2), 1)
    _card(axes, (0.15, 1.8, 1.8, 0.65), GREY, "search engine, frozen", ["nearest of $V$ to $q_t$"])
    _card(axes, (0.15, 0.65, 1.0, 0.55), GREY, "query $q_1$", ["as typed"])
    _film(axes, (2.4, 1.87, 1.15, 0.55))
    _say(axes, 2.97, 1.77, "top-1 video $v_t$", ha="center")
    told = [
        *prompt_text.user_message("$q_1$", "$v_t$").splitlines(),
        ("", BLACK),
        ("<think> $r_t$ </think>", BLUE),
    ]
    told += [("<answer> $y_{ret}$ </answer>", BLUE)]
    _card(axes, (4.0, 1.5, 1.75, 1.3), BLUE, "policy verifies", told)
    times = ["<start> s </start> <end> e </end>"]
    _card(axes, (6.65, 2.65, 2.2, 1.05), ORANGE, "grounding $y_{time}$", times)
    _timeline(axes, 6.8, 2.98, 1.9, (0.35, 0.7))
    soft = [f"{REFINE}, then {n} steps of the policy:", rf"$q_{{soft}} \in R^{{N \times D}}$, N = {n}"]
    _card(axes, (6.65, 1.2, 2.2, 0.95), RED, "soft query refinement (SQR)", soft)
    _chips(axes, 6.75, 1.31, n, 2.0)
    _card(axes, (7.75, 0.15, 1.1, 0.5), GREY, "end", ["no_refine"])
    _arrow(axes, [(1.05, 2.95), (1.05, 2.45)], both=True)
    _arrow(axes, [(0.65, 1.2), (0.65, 1.8)])
    _arrow(axes, [(1.95, 2.15), (2.4, 2.15)])
    _arrow(axes, [(3.55, 2.15), (4.0, 2.15)])
    _arrow(axes, [(5.75, 2.5), (5.95, 2.5), (5.95, 3.17), (6.65, 3.17)])
    _say(axes, 6.02, 3.36, "matched", weight="bold")
    _arrow(axes, [(5.75, 1.75), (6.65, 1.75)])
    _say(axes, 5.82, 2.08, "not_matched", weight="bold")
    _say(axes, 5.82, 1.7, "or unknown")
    _arrow(axes, [(8.3, 1.2), (8.3, 0.65)])
    _say(axes, 8.22, 0.99, f"without {REFINE}", ha="right")
    _arrow(axes, [(7.0, 1.2), (7.0, 0.4), (1.55, 0.4), (1.55, 1.8)], RED)
    _say(axes, 2.05, 0.6, "$q_{t+1}$ = query +", size=8)
    _chips(axes, 2.98, 0.46, n, 1.4)
    _say(axes, 4.5, 0.6, f"turn t + 1, while t < T = {last}", size=8, colour=RED)
    _say(axes, 4.5, 0.32, f"at t = {last}: ranked, not looked at (budget)")
    return figure


# --- F2


def example(profile: Profile) -> tuple[str, Episode, Episode] | None:
    """The search of F7: data set, SQR's episode and HQR's; None where no search fits its rule."""
    found = search_figures.in_turns(
        search_figures.fitting(search_figures.compared(profile), search_figures.ahead, search_figures.AGAINST)
    )
    return (found[0][0], *found[0][1]) if found else None


def films(profile: Profile, dataset: str, soft: Episode, hard: Episode) -> dict[str, list[np.ndarray]]:
    """{video: two frames} of the rendered videos in the example, from the moments most like the one asked for."""
    shelf, found = qualitative.Shelf(profile, dataset, {}), {}
    asked, looks = qualitative.asked_for(soft, shelf.scenes), (soft.turns[0], _after(hard), _after(soft))
    wanted = list(dict.fromkeys(look.shown_id for look in looks))
    for video in annotations.find_videos(profile.data_dir(dataset) / "videos", wanted):
        moment = asked if video.id == soft.gt_video else shelf.closest(asked, video.id)
        times = moment.start + np.array([0.35, 0.75]) * (moment.end - moment.start)
        clip = video_reader.read_frames(video.path, times) if video.path else None
        if clip and clip.problem is None:
            found[video.id] = list(clip.frames)
    return found


def _after(one):
    """The look after the first refinement, or the last one of a search that found the right video."""
    return one.turns[-1] if one.turns[-1].shown_is_gt else one.turns[1]


@plots.style()
def hard_and_soft(profile: Profile, pair: tuple | None, shown: dict) -> Figure:
    """F2: the same query and video, then a rewritten query (a) or soft tokens (b); `shown` is that of `films`."""
    figure, axes = _canvas(5.5)
    titles = "(a) hard query refinement (HQR reasoned, ours)", "(b) soft query refinement (SQR)"
    prompts = ("prompted", prompt_text.SYSTEM_HQR), ("trained", prompt_text.SYSTEM)
    _, soft, hard = pair or (None, None, None)
    for left, title, (who, prompt), one in zip((0.05, 4.55), titles, prompts, (hard, soft), strict=True):
        _box(axes, (left, 0.05, 4.4, 5.4), BLACK, edge="#cccccc")
        _say(axes, left + 0.1, 5.35, title, size=9.5, weight="bold")
        _search(axes, left, one, shown)
        told = f"{prompt.partition('.')[0]}. … {_on_wrong_video(prompt)}"
        _card(axes, (left + 0.1, 2.2, 4.0, 0.8), BLUE, f"policy, {who}", _wrap(told, 3.8, 3))
        _card(axes, (left + 0.1, 0.15, 4.0, 1.8), GREY, "reply", _said(one))
        _arrow(axes, [(left + 0.72, 3.25 if one else 3.4), (left + 0.72, 3.0)])
        _arrow(axes, [(left + 2.1, 2.2), (left + 2.1, 1.95)])
        _arrow(axes, [(left + 4.0, 0.55), (left + 4.25, 0.55), (left + 4.25, 4.8), (left + 4.1, 4.8)], RED)
    update = hard.turns[0].update_text if hard else "TEXT"
    words = _wrap(f"<query_update>{update}</query_update>", 3.6, 3)
    _card(axes, (0.25, 0.22, 3.8, 0.78), RED, "the next query, in place of this one", words, dashed=True)
    _card(axes, (4.75, 0.22, 3.8, 0.78), RED, "the next query: this one, and behind it", [REFINE])
    end = _chips(axes, 5.5, 0.59, profile.n_soft, 1.6)
    _say(axes, end + 0.08, 0.73, f"{profile.n_soft} soft tokens")
    _say(axes, 4.85, 0.46, "$L_{ret}$ moves it")
    _say(axes, 5.85, 0.46, "▶ to the right video", colour=RED)
    _say(axes, 7.1, 0.46, f"◀ away from {profile.sft_negatives or 'all'} others", colour=BLUE)
    return figure


def _said(one):
    """The first reply of a search, shortened: reasoning and verdict."""
    text = one.turns[0].reply.text if one else f"<think> … </think> {NOT}"
    thought, _, rest = text.rpartition("</think>")
    verdict = replies.inside("answer", rest)
    answer = "no readable verdict" if verdict is None else f"<answer>{verdict}</answer>"
    return [*_wrap(f"{thought}</think>", 3.8, 3), *((line, PINK) for line in _wrap(answer, 3.8, 1))]


def _search(axes, left, one, shown):
    """The upper part of a panel: query, engine, the video of turn 1 and the one after refinement."""
    query = _wrap(f'"{one.query}"', 3.8, 2) if one else ["as typed"]
    _card(axes, (left + 0.1, 4.5, 4.0, 0.6), GREY, "query", query)
    _card(axes, (left + 1.6, 3.85, 1.0, 0.4), GREY, "engine")
    _card(axes, (left + 1.6, 3.3, 1.0, 0.33), GREY, "corpus")
    _arrow(axes, [(left + 2.1, 3.63), (left + 2.1, 3.85)], both=True)
    _arrow(axes, [(left + 2.1, 4.5), (left + 2.1, 4.25)])
    _arrow(axes, [(left + 1.6, 4.05), (left + 1.35, 4.05)])
    _arrow(axes, [(left + 2.6, 4.05), (left + 2.85, 4.05)], RED)
    looks = (one.turns[0], _after(one)) if one else (None, None)
    for turn, x, look in zip((1, 2), (left + 0.1, left + 2.85), looks, strict=True):
        good = bool(look) and look.shown_is_gt
        _film(axes, (x, 3.62, 1.25, 0.66), 2, look and shown.get(look.shown_id), GREEN if good else BLACK)
        if look:
            ends = f"right ✓ IoU {look.iou:.2f}" if good else "wrong ✗"
            _say(axes, x, 3.56, f"turn {look.t}: {ends}")
            tone = GREEN if good else RED
            _say(axes, x, 3.4, f"right video: rank {look.rank_in}", weight="bold", colour=tone)
        else:
            _say(axes, x, 3.56, f"turn {turn}")


# --- A1


@plots.style()
def rewriters() -> Figure:
    """A1: what each variant of HQR is given, asked and answers."""
    figure, axes = _canvas(4.45)
    heads = {0.95: "query", 1.7: "rejected video", 2.85: "reasoning", 3.9: "the policy is told", 6.6: "reply"}
    for x, head in heads.items():
        _say(axes, x, 4.33, head, size=9, weight="bold")
    for y, variant in zip((2.98, 1.83, 0.68), ("blind", "seen", "reasoned"), strict=True):
        prompt, sees = hqr.rewrite_prompt(variant)
        judges = prompt == prompt_text.SYSTEM_HQR
        _say(axes, 0.1, y + 0.72, variant, size=10, weight="bold")
        _say(axes, 0.1, y + 0.5, "ours", colour=GREY)
        places = [(x, y + 0.25, width, 0.55) for x, width in ((0.95, 0.65), (1.7, 1.05), (2.85, 0.75))]
        _card(axes, places[0], GREY, "$q_1$", ["as typed"])
        if _given(axes, places[1], sees):
            _film(axes, places[1], 2)
        if _given(axes, places[2], judges):
            _card(axes, places[2], GREY, "$r_t$", ["<think>"])
        title = "in the reply that judges" if judges else "in a call after not_matched"
        asked = f"… {_on_wrong_video(prompt)}" if judges else prompt
        _card(axes, (3.9, y, 2.4, 1.05), BLUE, title, _wrap(asked, 2.23, 5))
        said = ["<think> $r_t$ </think>", (NOT, PINK)] if judges else []
        title = "verdict and update" if judges else "update"
        _card(axes, (6.6, y, 2.3, 1.05), RED, title, [*said, "<query_update>TEXT</query_update>"])
        _arrow(axes, [(3.6, y + 0.52), (3.9, y + 0.52)])
        _arrow(axes, [(6.3, y + 0.52), (6.6, y + 0.52)])
    ways = [f"{way}: embed({hqr.compose_query('$q_1$', 'TEXT', way)})" for way in ("replace", "append")]
    _card(axes, (0.95, 0.08, 7.95, 0.45), GREY, "next query $q_{t+1}$", ["      ".join(ways)])
    return figure


def _given(axes, place, there):
    """Whether a variant has an input; if not, its place is marked as empty."""
    x, y, width, height = place
    if not there:
        _box(axes, place, BLACK, edge="#cccccc", dashed=True)
        _say(axes, x + width / 2, y + height / 2, "none", ha="center", va="center", colour=GREY)
    return there


# --- Parts


def _canvas(height, width=9):
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return figure, axes


def _box(axes, place, colour, edge=None, dashed=False):
    """A rounded box at (x, y, width, height)."""
    look = {"facecolor": TINT[colour], "edgecolor": edge or colour, "linestyle": "--" if dashed else "-"}
    shape = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch(place[:2], *place[2:], shape, linewidth=1.1, gid="box", **look))


def _card(axes, place, colour, title, lines=(), dashed=False):
    """A box with a bold title and lines of words, or (words, colour), below it."""
    x, y, width, height = place
    _box(axes, place, colour, dashed=dashed)
    centred = {"x": x + width / 2, "y": y + height / 2, "ha": "center", "va": "center"}
    at = {"x": x + 0.1, "y": y + height - 0.09} if lines else centred  # a title alone stands in the middle
    _say(axes, words=title, size=8.5, weight="bold", **at)
    for number, line in enumerate(lines):
        words, tone = (line, BLACK) if isinstance(line, str) else line
        _say(axes, x + 0.1, y + height - 0.27 - STEP * number, words, colour=tone)


def _say(axes, x, y, words, size=SIZE, colour=BLACK, **look):
    """Words whose upper left corner is at (x, y)."""
    axes.text(x, y, words, size=size, color=colour, **{"va": "top", "gid": "text"} | look)


def _arrow(axes, corners, colour=BLACK, both=False):
    """An arrow along corners; red ones, which lead back to the search, are dashed."""
    look = {"arrowstyle": "<|-|>" if both else "-|>", "mutation_scale": 9, "linewidth": 1.2, "color": colour}
    dashes = (0, (4, 2)) if colour == RED else "-"
    axes.add_patch(FancyArrowPatch(path=Line(corners), linestyle=dashes, gid="arrow", **look))


def _chips(axes, x, y, n, width):
    """N soft tokens in a row, at most `width` wide; where the row ends."""
    pitch = min(0.18, width / n)
    look = {"edgecolor": BLACK, "linewidth": 4 * pitch, "gid": "chip", "zorder": 4}
    for place in range(n):
        look["facecolor"] = CHIPS[place % len(CHIPS)]
        axes.add_patch(Rectangle((x + pitch * place, y), 0.78 * pitch, 0.14, **look))
    return x + pitch * n


def _film(axes, place, count=3, pictures=None, edge=BLACK):
    """A strip of film; where there are no pictures, a sign in place of each."""
    x, y, width, height = place
    look = {"facecolor": "#333333", "edgecolor": edge, "linewidth": 1.6, "gid": "box"}
    axes.add_patch(Rectangle((x, y), width, height, **look))
    rim, pitch = 0.09 * height, width / count
    for number in range(count):
        left, right = x + pitch * (number + 0.06), x + pitch * (number + 0.94)
        low, high, middle = y + 2 * rim, y + height - 2 * rim, x + pitch * (number + 0.5)
        if pictures:
            axes.imshow(pictures[number], extent=(left, right, low, high), aspect="auto", zorder=3)
        else:
            axes.add_patch(Rectangle((left, low), right - left, high - low, facecolor="#dddddd"))
            sign, half = (high - low) / 4, (low + high) / 2
            corners = [(middle - sign, half - sign), (middle - sign, half + sign), (middle + sign, half)]
            axes.add_patch(Polygon(corners, facecolor=GREY))
        for hole in np.linspace(left, right - 0.05, 4):
            for edge_y in (y + 0.5 * rim, y + height - 1.5 * rim):
                axes.add_patch(Rectangle((hole, edge_y), 0.05, rim, facecolor="white"))


def _timeline(axes, x, y, width, span):
    """A video as a bar, with a span (shares of its length) that has a start and an end."""
    start, end = (x + width * share for share in span)
    axes.add_patch(Rectangle((x, y), width, 0.1, facecolor="#dddddd"))
    axes.add_patch(Rectangle((start, y), end - start, 0.1, facecolor=ORANGE))
    for place, word in ((start, "start"), (end, "end")):
        axes.plot((place, place), (y - 0.05, y + 0.15), color=BLACK, linewidth=1.2)
        _say(axes, place, y - 0.08, word, ha="center")


def _on_wrong_video(prompt):
    """What a judge's prompt says on a wrong video."""
    return prompt[prompt.rindex("If no scene") :]


def _wrap(words, width, most):
    """Words as at most `most` lines of at most `width` inches; an ellipsis for what is left out."""
    for letters in range(int(30 * width), 2, -1):
        lines = textwrap.wrap(words, letters, max_lines=most, placeholder=" …")
        if all(_inches(line) <= width for line in lines):
            return [line.replace("$", r"\$") for line in lines]


def _inches(words):
    """How long words are in a box; what is drawn differs by a few percent."""
    return 1.03 * text_to_path.get_text_width_height_descent(words, FontProperties(size=SIZE), False)[0] / 72
