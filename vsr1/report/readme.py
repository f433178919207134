"""Write the generated parts of README.md and docs/, between html comments, from results/<profile>/ and nothing else."""

import json
import re
from collections import Counter

from vsr1 import config
from vsr1.config import InputError, Profile
from vsr1.evaluation import gallery_sizes
from vsr1.evaluation.claims import CLAIMS
from vsr1.evaluation.evaluate import RECIPES
from vsr1.report import html_report, results, tables, templates, verdicts
from vsr1.report.tables import MEASURED, PAPER
from vsr1.training import rollout

SYSTEMS = {"zs": "ZS", "ft": "FT", "walkdown": "FT, rank fallback"}
SYSTEMS |= {"sft": "stage 1 only", "vsr1": "VideoSearch-R1"}
METRICS = ("vcmr@0.5", "vr@1", "right_last")
SUMMARY = {  # claim: in the words of somebody who reads about it for the first time
    "refined": "Refining finds more right videos than one search (R@1)",
    "vsr1-walkdown": "The loop beats FT with rank fallback (VCMR)",
    "ver-ft": "Its verdicts are right more often than FT's (VER)",
    "grpo-vcmr": "Stage 2 adds to stage 1 (VCMR)",
    "sqr-hqr-reasoned": "Soft tokens repair more failed searches than prompted rewrites (R@1)",
    "turn-3": "A third turn adds next to nothing, with the latest soft tokens alone (VCMR)",
    "skip-walkdown": "*Ours:* the loop that shows no video twice beats FT with rank fallback (VCMR)",
}
PREMISE = {  # in the same table: a number of the premise, (table, system, metric), in points
    "*Ours:* no loop, soft tokens from the query alone, then down the ranking, beats the loop (VCMR, three videos)": (
        "P1",
        "adapter-soft-vsr1",
        "over-vsr1",
    ),
    "*Ours:* the same with a linear map of the query beats the loop that shows no video twice (VCMR, three videos)": (
        "P1",
        "adapter-vec-ft",
        "over-skip",
    ),
}
TALLY = {  # verdict: how many cells have it, in words
    "agrees": "{} agree",
    "disagrees": "{} disagree",
    "inconclusive": "{} are inconclusive",
    "MISSING": "{} are not measured",
    "cannot": "{} cannot be tested here",
}
STEPS = {  # the first part of a step's name: what it does
    "videos": "rendering",
    "embed": "embedding",
    "episodes": "evaluations",
    "sft": "stage 1",
    "ft": "FT baseline",
    "grpo": "stage 2",
    "soft_token_bound": "upper bound of soft tokens",
    "twostage": "two-stage baseline",
    "variants": "runs with other knobs",
    "retry": "retry study",
    "qualitative": "gallery",
    "depth_ranks": "ranks for figure F6",
    "first": "adapters of queries",
    "adapter-soft": "adapters of queries",
    "interventions": "interventions",
}
PAPER_VARIANTS = ("no-ret", "no-verif", "large")  # runs with other knobs; the others are of `make ablations`


def write(profile: Profile) -> None:
    """Write every page with its generated parts made anew."""
    for name in PAGES:
        path = config.ROOT / name
        path.write_text(fill(name, path.read_text(encoding="utf-8"), profile), encoding="utf-8")


def fill(name: str, text: str, profile: Profile) -> str:
    """Return the text of a page of PAGES with its generated parts made anew."""
    numbers = results.load(profile)
    for part, generate in PAGES[name].items():
        slot = re.compile(rf"(<!-- {part} -->\n).*?(<!-- /{part} -->)", re.S)
        if len(slot.findall(text)) != 1:
            raise InputError(f"{name}: expected one <!-- {part} --> and one <!-- /{part} --> behind it")
        generated = generate(profile, numbers).strip()
        text = slot.sub(lambda match, body=generated: f"{match[1]}\n{body}\n\n{match[2]}", text)
    return text


def _picture(profile, _):
    """Show one search, F1, with what its caption says before the rule that chose it."""
    path = profile.results() / "figures" / "F1.png"
    if not path.exists():
        return "No search of this run fits the rule of figure F1."
    caption = html_report.caption(path).partition(". Rule (")[0]
    name = f"results/{profile.name}/figures/F1"
    return f'<a href="{name}.svg"><img src="{name}.png" width="540" alt="One search, turn by turn"></a>\n\n{caption}.'


def _summary(profile, numbers):
    """Show the claims of SUMMARY, and all verdicts on the paper, counted."""
    judged = verdicts.judge(numbers, profile.datasets)
    named = {name: [verdict for verdict in judged if verdict.name == name] for name in CLAIMS}
    rows = {
        words: [verdicts.paper_values(named[name]), *map(_brief, named[name])]
        for name, words in SUMMARY.items()
    }
    for words, number in PREMISE.items():
        rows[words] = ["—", *(_gain(numbers, dataset, *number) for dataset in profile.datasets)]
    claims = [name for name, claim in CLAIMS.items() if claim.group == "paper"]
    tally = Counter(_word(verdict) for name in claims for verdict in named[name])
    return templates.render(
        "summary.txt",
        profile=profile,
        rows=rows,
        seeds=_seeds(numbers),
        older=_older(profile),
        claims=len(claims),
        counts=[words.format(tally[word]) for word, words in TALLY.items() if tally[word]],
        missing=_missing(profile, numbers),
    )


def _brief(verdict):
    """Return the difference without its interval, and the verdict."""
    value, word, _ = verdicts.best_known(verdict)
    return word.partition(":")[0] if value == "—" else f"{value.partition(' ')[0]} {word}"


def _gain(numbers, dataset, table, system, metric):
    """Return a difference of the premise without its interval, and which side is ahead."""
    entry = results.best_row(numbers, table, dataset, system, metric)
    return "`make premise`" if entry is None else f"{entry['value']:+.1f} {verdicts.side(entry)}"


def _word(verdict):
    """Return the key of TALLY; none of a data set on which a claim is not made."""
    word = verdicts.best_known(verdict)[1]
    return next((key for key in TALLY if word.startswith(key)), None)


def _answers(profile, numbers):
    """Show what each control of the premise says, a column a data set."""
    lines = [f"|  | {' | '.join(profile.datasets)} |", "| --- |" + " ---: |" * len(profile.datasets)]
    for heading, rows in verdicts.answers(numbers, profile.datasets).items():
        lines.append(f"| **{heading}** |{' |' * len(profile.datasets)}")
        lines += [f"| {words} | {' | '.join(cells)} |" for words, cells in rows.items()]
    return "\n".join([*lines, "", verdicts.basis(profile, numbers)])


def extra_systems() -> list[str]:
    """List the systems that `make premise` evaluates beyond `make paper` and `make ablations`."""
    evaluated = {"sft", "walkdown-ft", "vsr1-first", "skip", *rollout.VARIANTS}
    return [name for name in RECIPES if name not in evaluated]


def _cost(*_):
    """Bound how many videos `make premise` looks at under the profile `paper`, by its systems and turns."""
    profile = config.load("paper")
    looks = sum(RECIPES[name].turns or profile.max_turns for name in extra_systems())
    curves = len(gallery_sizes.SYSTEMS) * profile.max_turns
    levels = len(gallery_sizes.LEVELS) - 1  # that of all test videos is there
    lines = [
        "| data set | test queries | looks, at most | hours, at one second a look |",
        "| --- | ---: | ---: | ---: |",
    ]
    for dataset in profile.datasets:
        queries = round(results.published()[f"D1/{dataset}/test/queries"])
        total = queries * looks + min(queries, gallery_sizes.QUERIES) * curves * levels
        lines.append(f"| {dataset} | {queries:,} | {total:,} | {total / 3600:.0f} |")
    return "\n".join(lines)


def _run(profile, numbers):
    """Say what a right run prints, and what the committed one took."""
    counts = Counter(numbers.verdict)
    checked = ", ".join(f"{counts[word]} {word}" for word in results.VERDICTS)
    origin = results.read(profile, "provenance")
    minutes = sum(step["minutes"] for step in paper_steps(origin).values())
    device = "{cpu}, {cores} cores, {memory_gb} GB".format(**origin["device"])
    return (
        f"`make paper` ends with `report: results/{profile.name}/report.html`, "
        f"and `make check` then prints `{checked}`. "
        f"The steps of the committed run took {minutes:.0f} minutes in all, {profile.parallel_steps} at a time, "
        f"on {device}, {origin['device']['gpu'] or 'no GPU'}, commit {origin['commit'][:7]}."
    )


def _time(profile, _):
    """Show minutes and most memory of the steps of `make paper` by kind, and what it ran on."""
    origin, minutes, memory = results.read(profile, "provenance"), Counter(), Counter()
    for name, step in paper_steps(origin).items():
        dataset, *parts = (part for part in name.split("/") if part != f"seed-{origin['seed']}")
        kind = STEPS.get(parts[0], parts[0])
        minutes[kind, dataset] += step["minutes"]
        memory[kind] = max(memory[kind], step["peak_mb"] / 1000)
    rows = {
        kind: [f"{minutes[kind, dataset]:.1f}" for dataset in profile.datasets] + [f"{peak:.1f}"]
        for kind, peak in memory.most_common()
    }
    return templates.render(
        "time.txt", profile=profile, rows=rows, origin=origin, total=sum(minutes.values())
    )


def paper_steps(origin):
    """Return the steps of `make paper`; names tell which `make premise`, `make ablations` and `make seeds` add."""
    systems = extra_systems()

    def added(name):
        _, *parts = (part for part in name.split("/") if part != f"seed-{origin['seed']}")
        match parts:
            case [seed, *_] if seed.startswith("seed-"):
                return True
            case ["episodes", system]:
                return system in systems or "-of-" in system
            case ["variants", variant, *_]:
                return variant not in PAPER_VARIANTS
            case ["first", adapter]:
                return adapter not in ("adapter-vec", "adapter-soft", "vsr1")
        return parts[0] not in STEPS and parts[0] != "corpus"

    return {name: step for name, step in origin["stages"].items() if not added(name)}


def _older(profile):
    """Name the commit of results that were made with other settings than the profile has now, else return None."""
    origin = results.read(profile, "provenance")
    return origin["commit"][:7] if origin["digest"] != profile.digest() else None


def _results(profile, numbers):
    """Render the main results, the paper's beside them, the claims by group, and what is missing."""
    cells = {MEASURED: _measured, PAPER: _published}
    blocks = {
        kind: {
            label: [write(numbers, dataset, system) for dataset in profile.datasets]
            for system, label in SYSTEMS.items()
        }
        for kind, write in cells.items()
    }
    return templates.render(
        "results.txt",
        profile=profile,
        blocks=blocks,
        claims=verdicts.sheet(verdicts.judge(numbers, profile.datasets)),
        rule=verdicts.rule(profile),
        seeds=_seeds(numbers),
        older=_older(profile),
        missing=_missing(profile, numbers),
    )


def _seeds(numbers):
    return sorted({seed for seeds in numbers[numbers.table == "R2"].seeds for seed in seeds})


def _missing(profile, numbers):
    return [item.id for item in html_report.missing(profile, numbers)]


def _measured(numbers, dataset, system):
    """Return the METRICS of a system, over seeds where it is trained, else of this run."""
    values = []
    for metric in METRICS:
        entry = results.best_row(numbers, "T1", dataset, system, metric)
        values.append(tables.cell(None if entry is None else entry.to_dict()))
    return " / ".join(values)


def _published(numbers, dataset, system):
    """Return the paper's METRICS of a system."""
    published = results.published()
    return " / ".join(results.digits(published.get(f"T1/{dataset}/{system}/{metric}")) for metric in METRICS)


def _figures(profile, numbers):
    """Show every figure in results/<profile>/ with its caption, and link to every table."""
    folder = profile.results()
    items = [item for item in html_report.items(profile, numbers) if item.available]
    return templates.render(
        "figures.txt",
        home=f"../results/{profile.name}",
        items=items,
        pictures={i.id: [path for path in i.pictures if path.is_relative_to(folder)] for i in items},
        tables={item.id for item in items if (folder / "tables" / f"{item.id}.md").exists()},
        caption=html_report.caption,
    )


def _index(*_):
    """Show what lies in results/mini/: executed notebooks with what they ask, and every figure, small."""
    profile = config.load("mini")
    folder, numbers = profile.results(), results.load(profile)
    questions = {}
    for path in sorted((folder / "notebooks").glob("*.ipynb")):
        first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
        questions[path.stem] = re.search(r"\*\*(.+?)\*\*", "".join(first["source"]))[1]
    items = [item for item in html_report.items(profile, numbers) if item.available]
    pictures = [(path, item) for item in items for path in item.pictures if path.is_relative_to(folder)]
    return templates.render("index.txt", notebooks=questions, pictures=pictures, profile=profile, columns=3)


def _deviations(*_):
    """List the departures from the paper by severity."""
    rows = html_report.departures()
    groups = {level: {name: row for name, row in rows.items() if row.severity == level} for level in "ABC"}
    return templates.render("deviations.txt", groups=groups)


def _shapes(*_):
    """Show the memory that parts of a run took at 2B shapes on a CPU, from results/bench/cpu.json."""
    measured = json.loads((config.ROOT / "results" / "bench" / "cpu.json").read_text(encoding="utf-8"))
    lines = [
        "| profile | what | how many | prompt + reply, tokens | most memory, GB | seconds there |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in measured["rows"]:
        tokens = f"{row['prompt_tokens']:,} + {row['reply_tokens']}"
        cells = f"`{row['profile']}`", row["what"], str(row["count"]), tokens, str(row["peak_gb"])
        lines.append(f"| {' | '.join(cells)} | {row['seconds']:.0f} |")
    device = "{cpu}, {cores} cores, {memory_gb} GB".format(**measured["machine"])
    return "\n".join([*lines, "", f"{device}, no GPU; commit {measured['commit'][:7]}."])


PAGES = {  # page: {its generated parts: what generates them}
    "README.md": {"picture": _picture, "summary": _summary, "run": _run},
    "docs/results.md": {"results": _results},
    "docs/figures.md": {"figures": _figures},
    "results/mini/README.md": {"index": _index},
    "docs/premise.md": {"answers": _answers, "cost": _cost},
    "docs/reproducibility.md": {"time": _time},
    "docs/scaling.md": {"shapes": _shapes},
    "DEVIATIONS.md": {"deviations": _deviations},
}
