"""Draw frames of video with words: a canvas measured in inches, and contact sheets of clips."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, Rectangle

from vsr1.config import Profile
from vsr1.mini.drawing import LIGHTS
from vsr1.report import plots, results
from vsr1.report.plots import BLACK, DARK, GREEN, GREY, RED, SHADES

# Of the right video and moment.
DASHED = {"fill": False, "edgecolor": GREEN, "linestyle": "--", "linewidth": 1.4}
MARGIN, COLUMN, GAP = 0.15, 4.25, 0.2  # inches: two columns
COLUMNS = (MARGIN, MARGIN + COLUMN + GAP)
TINT, MOON = np.array(LIGHTS["night"][0]), np.array(LIGHTS["night"][2][2])
BRIGHTENED = "Night scenes are brightened for print; models see them as they are."


def brighten_night(frame: np.ndarray) -> np.ndarray:
    """Return a rendered night scene (H, W, 3) nearly without its tint, and any other frame as it is.

    The tint makes pink and mauve alike, and white and lavender. It is known by two signs: nothing is as red as the sun
    of day and dusk, and there is a moon in this tint. So frames of real videos stay as they are.
    """
    pixels = frame.reshape(-1, 3)
    moon = (np.abs(pixels - MOON * TINT).max(axis=1) < 16).mean() > 0.001
    if not moon or np.percentile(pixels[:, 0], 99.5) > 232:
        return frame
    return np.clip(0.9 * frame / TINT, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Strip:
    """Frames of one clip, or the reason why there are none."""

    frames: np.ndarray | None  # (T, H, W, 3) uint8; None: unreadable
    timestamps: np.ndarray | None  # (T,) seconds
    caption: str
    span: tuple[float, float] | None = None  # seconds; frames inside are marked
    problem: str | None = None


class Canvas:
    """White paper measured in inches from its top left corner, as long as what is drawn on it."""

    def __init__(self, width: float = 2 * (MARGIN + COLUMN) + GAP, dpi: int | None = None):
        self.width, self.figure = width, Figure(figsize=(width, 1), dpi=dpi)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.pen = FigureCanvasAgg(self.figure).get_renderer()

    def crop(self, height: float) -> Figure:
        """Return the figure, cropped to this height."""
        self.axes.set(xlim=(0, self.width), ylim=(height, 0))
        self.figure.set_size_inches(self.width, height)
        return self.figure

    def write(self, x: float, y: float, width: float, pieces: list[tuple[str, dict]], size=8.5) -> float:
        """Write pieces of (text, properties) as one wrapped paragraph; return the y below it.

        Properties are those of fonts, color, and struck: with a line through it.
        """
        left, line = x, size * 1.4 / 72
        for text, props in pieces:
            ink = {"color": props.get("color", BLACK)}
            kind = {key: value for key, value in props.items() if key not in ("color", "struck")}
            font = FontProperties(size=size, **kind)
            for word in re.findall(r"\s+|\S{1,40}", text):
                blank = word.isspace()
                pixels, _, _ = self.pen.get_text_width_height_descent(" " if blank else word, font, False)
                word_width = pixels / self.figure.dpi
                if blank and left == x:
                    continue  # no line begins with a blank
                if not blank and x < left and left + word_width > x + width + 0.02:
                    left, y = x, y + line
                if not blank:
                    self.axes.text(left, y + 0.72 * line, word, fontproperties=font, parse_math=False, **ink)
                if props.get("struck"):
                    self.axes.plot((left, left + word_width), (y + 0.52 * line,) * 2, linewidth=0.8, **ink)
                left += word_width
        return y + line

    def frames(self, x: float, y: float, strip: Strip, frame_width: float, dashed=False) -> float:
        """Draw frames side by side, `frame_width` inches each, with their seconds below; return the y below them.

        Frames inside the span are underlined, and night scenes are brightened. dashed: a dashed green frame around all.
        """
        if strip.frames is None:
            reason = [(f"cannot be read: {strip.problem}", {"color": RED})]
            return self.write(x, y, max(frame_width, 3), reason)
        count, height, width = strip.frames.shape[:3]
        frame_height, step = frame_width * height / width, frame_width + 0.05
        for n, (frame, seconds) in enumerate(zip(strip.frames, strip.timestamps, strict=True)):
            left = x + n * step
            right = left + frame_width
            box = (left, right, y + frame_height, y)
            self.axes.imshow(brighten_night(frame), extent=box, aspect="auto", interpolation="nearest")
            inside = strip.span is not None and strip.span[0] <= seconds <= strip.span[1]
            props = {"size": 7.5, "ha": "center", "weight": "bold" if inside else "normal"}
            self.axes.text(left + frame_width / 2, y + frame_height + 0.15, f"{seconds:.1f} s", **props)
            if inside:
                colour = GREEN if dashed else DARK
                self.axes.plot((left, right), (y + frame_height + 0.02,) * 2, color=colour, linewidth=2.5)
        if dashed:
            corner = (x - 0.04, y - 0.04)
            self.axes.add_patch(Rectangle(corner, count * step + 0.03, frame_height + 0.25, **DASHED))
        return y + frame_height + 0.28

    def box(self, x: float, top: float, width: float, bottom: float) -> None:
        """Draw a rounded box behind what stands there already."""
        props = {"boxstyle": "round,pad=0,rounding_size=0.08", "edgecolor": GREY, "facecolor": "#f6f6f6"}
        self.axes.add_patch(FancyBboxPatch((x, top), width, bottom - top, zorder=0, linewidth=0.8, **props))

    def soft_tokens(self, x: float, y: float, count: int) -> float:
        """Draw soft tokens as small squares, shades of one blue; return the x where they end."""
        for n in range(count):
            self.axes.add_patch(Rectangle((x + 0.15 * n, y), 0.12, 0.12, facecolor=SHADES[n % len(SHADES)]))
        return x + 0.15 * count + 0.05

    def timeline(self, x: float, y: float, width: float, seconds: float, right, named) -> float:
        """Draw a video as a bar with the right moment (dashed green) and the named one (dark); return the y below."""
        self.axes.add_patch(Rectangle((x, y), width, 0.12, facecolor="#dddddd"))
        for span, props in ((named, {"facecolor": DARK}), (right, DASHED)):
            start, end = (min(time, seconds) * width / seconds for time in span)
            self.axes.add_patch(Rectangle((x + start, y), end - start, 0.12, **props))
        return y + 0.2


# --- Contact sheets


@plots.style()
def contact_sheet(strips: list[Strip], columns: int = 6) -> Figure:
    """Draw a row of at most `columns` frames per clip, spread over it, below its caption."""
    canvas, y = Canvas(1.55 * columns + 0.05, dpi=100), 0.04  # frames at about their own size
    if not strips:
        return canvas.crop(canvas.write(0.05, y, 4, [("nothing to show here", {})]))
    for strip in strips:
        y = canvas.write(0.05, y, canvas.width - 0.1, [(strip.caption, {})], 9) + 0.03
        if strip.frames is not None:
            picked = np.unique(np.linspace(0, len(strip.frames) - 1, columns).round().astype(int))
            strip = Strip(strip.frames[picked], strip.timestamps[picked], strip.caption, strip.span)
        y = canvas.frames(0.05, y, strip, 1.5) + 0.05
    return canvas.crop(y)


def save_sheet(strips: list[Strip], folder: Path, name: str, caption: str) -> Path:
    """Save a contact sheet and return the path of its png; an svg would only wrap the same pixels."""
    caption = f"{caption}."
    if any(strip.span for strip in strips):
        caption += " Underlined frames lie inside the moment."
    frames = (frame for strip in strips if strip.frames is not None for frame in strip.frames)
    if any(brighten_night(frame) is not frame for frame in frames):
        caption += f" {BRIGHTENED}"
    return plots.save(contact_sheet(strips), folder, name, caption)


def sheets(profile: Profile, dataset: str) -> Path:
    """Return the folder of a data set's contact sheets, `<id>-<dataset>.png`."""
    return profile.runs(dataset) / "figures"


def copy_sheets(profile: Profile) -> None:
    """Copy the contact sheets of rendered videos to results/ and remove older ones of the same data sets.

    Sheets of data sets that were not run stay. Frames of real video stay out of git.
    """
    target = profile.results() / "figures"
    for dataset in profile.datasets:
        if results.was_run(profile, dataset):
            for path in target.glob(f"*-{dataset}.png"):
                path.unlink()
        if profile.world:
            for path in sheets(profile, dataset).glob(f"*-{dataset}.png"):
                shutil.copyfile(path, target / path.name)
