"""Write the generated part of README.md, between html comments, from results/<profile>/ and nothing else."""

import re

from vsr1 import config
from vsr1.config import InputError, Profile
from vsr1.report import html_report, results, tables, templates, verdicts
from vsr1.report.tables import MEASURED, PAPER

SYSTEMS = {"zs": "ZS", "ft": "FT", "walkdown": "FT, rank fallback"}
SYSTEMS |= {"sft": "stage 1 only", "vsr1": "VideoSearch-R1"}
METRICS = ("vcmr@0.5", "vr@1", "right_last")


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
    """Render the main results, the paper's beside them, the claims by group, and what is missing."""
    seeds = sorted({seed for seeds in numbers[numbers.table == "R2"].seeds for seed in seeds})
    cells = {MEASURED: _measured, PAPER: _published}
    blocks = {
        kind: {
            label: [write(numbers, dataset, system) for dataset in profile.datasets]
            for system, label in SYSTEMS.items()
        }
        for kind, write in cells.items()
    }
    claims = verdicts.sheet(verdicts.judge(numbers, profile.datasets))
    missing = [line.split(":")[0].split(" ")[0] for line in html_report.missing(profile, numbers)]
    values = {
        "blocks": blocks,
        "claims": claims,
        "rule": verdicts.rule(profile),
        "seeds": seeds,
        "missing": missing,
    }
    return templates.render("readme.txt", profile=profile, **values)


def _measured(numbers, dataset, system):
    """Return the METRICS of a system, over seeds where it is trained, else of this run."""
    values = []
    for metric in METRICS:
        run, seeds = (results.row(numbers, table, dataset, system, metric) for table in ("T1", "R2"))
        entry = run if seeds is None else seeds
        values.append(tables.cell(None if entry is None else entry.to_dict()))
    return " / ".join(values)


def _published(numbers, dataset, system):
    """Return the paper's METRICS of a system."""
    published = results.published()
    return " / ".join(results.digits(published.get(f"T1/{dataset}/{system}/{metric}")) for metric in METRICS)
