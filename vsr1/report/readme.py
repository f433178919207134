"""The part of README.md that comes from a run, between html comments: made of results/<profile>/ and nothing else."""

import re

from vsr1 import config
from vsr1.config import InputError, Profile
from vsr1.report import html_report, results, tables, verdicts

SYSTEMS = {
    "zs": "ZS",
    "ft": "FT",
    "walkdown": "FT, walking down",
    "sft": "stage 1 only",
    "vsr1": "VideoSearch-R1",
}


def write(profile: Profile) -> None:
    """README.md with its generated part made from results/<profile>/."""
    path = config.ROOT / "README.md"
    path.write_text(fill(path.read_text(encoding="utf-8"), profile), encoding="utf-8")


def fill(text: str, profile: Profile) -> str:
    """The README with its generated part made anew."""
    slot = re.compile(r"(<!-- results -->\n).*?(\n<!-- /results -->)", re.S)
    if len(slot.findall(text)) != 1:
        raise InputError("README.md: expected one <!-- results --> and one <!-- /results --> behind it")
    told = "\n".join(_results(profile, results.load(profile)))
    return slot.sub(lambda found: f"{found[1]}\n{told}\n{found[2]}", text)


def _table(heads, rows):
    """The lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def _results(profile, numbers):
    """Whether the paper is reproduced: the main results, its claims over several seeds, and what is missing."""
    seeds = sorted({seed for name in numbers if name.startswith("R2/") for seed in numbers[name]["seeds"]})
    cells = {system: [_pair(numbers, dataset, system) for dataset in profile.datasets] for system in SYSTEMS}
    told = _told(profile, numbers)
    lines = [
        f"VCMR at IoU .5 / VR R@1, percent, ± half the 95 % interval over queries; the trained rows are means over "
        f"seeds {', '.join(map(str, seeds))}. In parentheses the paper's values, of real video and Qwen3-VL-2B: "
        f"another world, beside which `{profile.name}` proves nothing.",
        "",
        *_table(["", *profile.datasets], [[label, *cells[name]] for name, label in SYSTEMS.items()]),
        "",
        "The claims behind it, in points: mean over these seeds (lowest to highest seed). **Holds**: the 95 % interval "
        "over queries lies above 0, and so does every seed. Not shown: one of these does not.",
        "",
        *_table(["", *profile.datasets], told),
    ]
    gone = [item.split(":")[0].split(" ")[0] for item in html_report.missing(profile, numbers)]
    missing = f"Missing so far: {', '.join(gone)}." if gone else "No table or figure of the paper is missing."
    held = sum("holds" in cell for row in told for cell in row[1:])
    return [*lines, "", f"{held} of {len(told) * len(profile.datasets)} cells hold. {missing}"]


def _pair(numbers, dataset, system):
    """Both main numbers of a system: over seeds where it is trained, else of this run; and the paper's."""
    parts = []
    for metric in ("vcmr@0.5", "vr@1"):
        one = numbers.get(f"T1/{dataset}/{system}/{metric}")
        trained = numbers.get(f"R2/{dataset}/{system}/{metric}")
        entry = trained or one
        parts.append((tables.cell(entry and entry | {"paper": None}), one and one["paper"]))
    ours, paper = zip(*parts, strict=True)
    published = f" ({' / '.join(map(str, paper))})" if None not in paper else ""
    return " / ".join(ours) + published


def _told(profile, numbers):
    """A row a claim, a cell a data set: over seeds, and the tokens of a refinement in this run."""
    rows = {}
    for one in verdicts.judge(numbers, profile.datasets):
        value, verdict = one.value, one.verdict
        if one.name != "tokens":
            keys = [f"R1/{one.dataset}/{one.name}/{key}" for key in ("points", "lowest", "highest")]
            if one.verdict_seeds == "not measured":
                continue
            value = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(numbers[key]["value"] for key in keys))
            verdict = one.verdict_seeds
        marked = f"**{verdict}**" if verdict == "holds" else verdict
        rows.setdefault(one.claim, {})[one.dataset] = f"{value} {marked}"
    return [[claim, *(cells.get(name, "—") for name in profile.datasets)] for claim, cells in rows.items()]
