"""Write the generated part of README.md, between html comments, from results/<profile>/ and nothing else."""

import re

from vsr1 import config
from vsr1.config import InputError, Profile
from vsr1.report import html_report, results, tables, templates, verdicts

SYSTEMS = {"zs": "ZS", "ft": "FT", "walkdown": "FT, rank fallback"}
SYSTEMS |= {"sft": "stage 1 only", "vsr1": "VideoSearch-R1"}


def write(profile: Profile) -> None:
    """Write README.md with its generated part made anew."""
    path = config.ROOT / "README.md"
    path.write_text(fill(path.read_text(encoding="utf-8"), profile), encoding="utf-8")


def fill(text: str, profile: Profile) -> str:
    """Return the text of a README with its generated part made anew."""
    slot = re.compile(r"(<!-- results -->\n).*?(\n<!-- /results -->)", re.S)
    if len(slot.findall(text)) != 1:
        raise InputError("README.md: expected one <!-- results --> and one <!-- /results --> behind it")
    generated = _generated(profile, results.load(profile))
    return slot.sub(lambda found: f"{found[1]}\n{generated}\n{found[2]}", text)


def _generated(profile, numbers):
    """Render the main results, the claims over several seeds, and what is missing."""
    seeds = sorted({seed for seeds in numbers[numbers.table == "R2"].seeds for seed in seeds})
    systems = {
        label: [_main_numbers(numbers, dataset, system) for dataset in profile.datasets]
        for system, label in SYSTEMS.items()
    }
    claims = {}
    for verdict in verdicts.judge(numbers, profile.datasets):
        claims.setdefault(verdict.claim, []).append(_claim(numbers, verdict))
    claims = {claim: cells for claim, cells in claims.items() if set(cells) != {"—"}}
    missing = [line.split(":")[0].split(" ")[0] for line in html_report.missing(profile, numbers)]
    values = {"systems": systems, "claims": claims, "seeds": seeds, "missing": missing}
    return templates.render("readme.txt", profile=profile, **values)


def _main_numbers(numbers, dataset, system):
    """Return VCMR and VR of a system, over seeds where it is trained, else of this run; and the paper's."""
    values, paper = [], []
    for metric in ("vcmr@0.5", "vr@1"):
        run, seeds = (results.row(numbers, table, dataset, system, metric) for table in ("T1", "R2"))
        entry = run if seeds is None else seeds
        values.append(tables.cell(None if entry is None else entry.to_dict() | {"paper": None}))
        paper.append(results.published().get(f"T1/{dataset}/{system}/{metric}"))
    return " / ".join(values) + ("" if None in paper else f" ({paper[0]} / {paper[1]})")


def _claim(numbers, verdict):
    """Return a claim over seeds with its verdict; of tokens, which have no seeds, that of this run."""
    value, word = verdict.value, verdict.verdict
    if verdict.name != "tokens":
        keys = [(verdict.dataset, verdict.name, metric) for metric in ("points", "lowest", "highest")]
        mean, lowest, highest = (results.row(numbers, "R1", *key) for key in keys)
        if mean is None:
            return "—"
        value = f"{mean.value:+.1f} ({lowest.value:+.1f} to {highest.value:+.1f})"
        word = verdict.verdict_seeds
    return f"{value} **{word}**" if word == "holds" else f"{value} {word}"
