"""Time `make paper` and `make test` of two clones, one after the other, and compare them step by step.

    python -m benchmarks.paper OLD NEW --out paper.json     folders of two clones that have an environment each

Wall and processor time, memory and the minutes of each step go into a file that is written after each command, so that
a comparison that was stopped goes on. What ran is printed as a table, in markdown.
"""

import argparse
import json
import re
import resource
import subprocess
import threading
import time
from pathlib import Path

import pandas as pd
import psutil

from vsr1 import cache

COMMANDS = {
    "make paper": ["make", "paper"],
    "again, nothing changed": ["make", "paper"],
    "make test": ["make", "test"],
}
NOT_IN_NAME = re.compile(r"(charades|didemo|activitynet|seed-\d+|variants?|plates)/|^variants/")
RENAMED = {  # names of steps at commit 47413cb: names of today
    "episodes/known-right": "episodes/oracle-right",
    "episodes/known-wrong": "episodes/oracle-wrong",
    "ladder": "soft_token_bound",
}


def measure(command: list[str], folder: Path) -> dict:
    """Run a command in a folder and return its seconds, seconds of processors, and most memory in GB.

    gb      of all its processes at one time, pages that they share left out; gb_process: of the largest
    """
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process, most = subprocess.Popen(command, cwd=folder), {"gb": 0.0, "gb_process": 0.0}
    sampler = threading.Thread(target=_sample, args=(process, most))
    sampler.start()
    if process.wait():
        raise SystemExit(f"{folder}: {' '.join(command)} ended with status {process.returncode}")
    seconds = time.monotonic() - started
    sampler.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(seconds), "processor": round(used), **most}


def _sample(process, most):
    """Look at the memory of a process and its descendants every second until it ends."""
    while process.poll() is None:
        sizes = []
        root = psutil.Process(process.pid)
        for member in [root, *root.children(recursive=True)]:
            try:
                info = member.memory_info()
            except psutil.Error:  # it has just ended
                continue
            sizes.append((info.rss - info.shared, info.rss))
        most["gb"] = max(most["gb"], round(sum(private for private, _ in sizes) / 1e9, 2))
        most["gb_process"] = max([most["gb_process"], *(round(rss / 1e9, 2) for _, rss in sizes)])
        time.sleep(1)


def step_minutes(clone: Path) -> dict[str, float]:
    """Return {step: minutes, all data sets together} of the last `make paper` of a clone, by its provenance."""
    steps = json.loads((clone / "results" / "mini" / "provenance.json").read_text())["stages"]
    minutes = {}
    for path, record in steps.items():
        name = NOT_IN_NAME.sub("", path)
        name = RENAMED.get(name, name)
        minutes[name] = minutes.get(name, 0.0) + record["minutes"]
    return minutes


def table(old: dict, new: dict) -> pd.DataFrame:
    """Return old, new and their ratio: commands in minutes of the wall, steps in minutes of one core."""
    rows = {name: (old[name]["seconds"] / 60, new[name]["seconds"] / 60) for name in COMMANDS if name in new}
    for name in list(rows):
        rows[f"{name}, processor"] = old[name]["processor"] / 60, new[name]["processor"] / 60
    steps = sorted(old["steps"].keys() | new["steps"].keys(), key=lambda name: -old["steps"].get(name, 0.0))
    rows |= {name: (old["steps"].get(name), new["steps"].get(name)) for name in steps}
    frame = pd.DataFrame(rows, index=["old", "new"]).T.astype(float)
    return frame.assign(ratio=frame.new / frame.old).round(2)


def main() -> None:
    """Measure what the file does not have yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clones", nargs=2, type=Path, metavar="CLONE")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    measured = json.loads(args.out.read_text()) if args.out.exists() else {}
    for clone in map(Path.absolute, args.clones):
        of_clone = measured.setdefault(clone.name, {})
        for name, command in COMMANDS.items():
            if name not in of_clone:
                of_clone[name] = measure(command, clone)
                of_clone["steps"] = step_minutes(clone)
                cache.write_json(args.out, measured)
    print("| | old | new | ratio |\n| --- | ---: | ---: | ---: |")
    for name, *numbers in table(*(measured[clone.name] for clone in args.clones)).itertuples():
        cells = ["" if pd.isna(number) else f"{number:.2f}" for number in numbers]
        print(f"| {' | '.join([name, *cells])} |")


if __name__ == "__main__":
    main()
