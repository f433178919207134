"""`make paper` on files in the layout of a real data set, by the knobs of `paper-24gb` but for models and amounts."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from vsr1 import config
from vsr1.data import annotations
from vsr1.mini import renderer, source, world
from vsr1.report import readme, results
from vsr1.training import released_replies, sft_examples

# What `paper-24gb` takes from the hub, and how much is done of everything: as in `smoke`.
SMALL = "engine engine_large policy max_frame_pixels sft_negatives grpo_negatives max_zero_std "
SMALL += "bootstrap_samples studies two_stage soft_token_bound"
LESS = {
    "max_turns": 2,
    "max_new_tokens": 64,
    "grpo_group": 2,
    "grpo_prompts_per_step": 2,
    "grpo_steps": 1,
    "num_val_prompts": 2,
    "engine_max_pixels": 4096,
    "engine_min_pixels": 1024,
}
TAUGHT = {"sft_lr": 2e-3, "sft_head_lr": 2e-3}  # so that few rows teach something
WORLD = {"train_videos": 14, "test_videos": 4, "foundation_videos": 8}


def knobs(name):
    return yaml.safe_load((config.PACKAGE / "profiles" / f"{name}.yaml").read_text())


def lay(home, drawn):
    """Annotations, videos and replies below `home` as their owners lay them out; which test video was left out.

    What the renderer knows stays in the folder `drawn`.
    """
    (drawn / "drawn.yaml").write_text(yaml.safe_dump(knobs("smoke") | {"world": WORLD}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "ROOT", drawn)
        profile = config.load(str(drawn / "drawn.yaml"))
        films, told = renderer.render(profile, "activitynet"), profile.data_dir("activitynet") / "corpus"
    for place in ("annotations", "videos/from the owners", "sft_data"):
        (home / place).mkdir(parents=True)
    for split, name in zip(("train", "test"), annotations.FILES["activitynet"], strict=True):
        shutil.copy(told / f"{split}.jsonl", home / "annotations" / name)
    missing = annotations.read_fig(told / "test.jsonl")[0].video
    for film in films.glob("*.mp4"):
        if film.stem != missing:
            shutil.copy(film, home / "videos" / "from the owners")
    queries, rows = annotations.read_fig(told / "train.jsonl"), []
    tell, _ = source.writers(profile, world.read_scenes(told))
    for at, query in enumerate(queries):
        shown = queries[at - 3].video if at % 3 else query.video
        rows.append(sft_examples.SFTExample(query.id, query.text, query.video, shown, (), tell(query, shown)))
    entries = [released_replies.to_released(row) for row in rows[::4]]  # one about each video
    (home / "sft_data" / released_replies.FILE).write_text(json.dumps(entries))
    return missing


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(clone, missing video): `make paper` was typed in it for one real data set."""
    clone, drawn = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("drawn")
    for name in ("vsr1", "notebooks", "results/expected"):
        shutil.copytree(config.ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("Makefile", "README.md", "requirements.txt"):
        shutil.copy(config.ROOT / name, clone)
    missing = lay(clone / "data" / "activitynet", drawn)
    profile = knobs("paper-24gb") | {name: knobs("smoke")[name] for name in SMALL.split()} | LESS | TAUGHT
    profile["soft_token_bound"] |= {"policy_steps": 0}  # as in paper-24gb
    profile["datasets"] = ["activitynet"]
    (clone / "real.yaml").write_text(yaml.safe_dump(profile))
    # An environment in which another clone is installed: all that runs must be the code of this one.
    words = ["make", "paper", "PROFILE=real.yaml", f"PY={sys.executable}"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=clone, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return clone, missing


def test_all_notebooks_run_in_16_bits_without_what_the_renderer_knows(made):
    """And what they measure stands beside the paper's numbers."""
    clone, _ = made
    page = (clone / "results/real/report.html").read_text(encoding="utf-8")
    assert "judged against the published values" in page
    sheet = "runs/real/activitynet/seed-42/figures/E3-activitynet.png"  # its frames stay out of results/
    assert f'href="../../{sheet}"' in page and (clone / sheet).exists()
    assert not list((clone / "results").rglob("E3-*.png"))
    numbers = json.loads((clone / "results/real/numbers.json").read_text())
    for system in ("zs", "walkdown", "ft", "sft", "vsr1", "twostage"):
        assert numbers[f"T1/activitynet/{system}/vcmr@0.5"]["value"] is not None, system
    queries, published = numbers["D1/activitynet/test/queries"], results.published()
    assert (queries["value"], queries["paper"]) == (14, published["D1/activitynet/test/queries"])
    rungs = {name.split("/")[2] for name in numbers if name.startswith("L1/activitynet")}
    assert "held-scaled-n4-r8" in rungs and not any(name.startswith("overfit-policy") for name in rungs)
    assert not list(clone.rglob("scenes.jsonl")) and not list(clone.rglob("*.failed.ipynb"))


def test_the_time_of_make_paper_counts_its_steps_and_no_others(made):
    origin = json.loads((made[0] / "results/real/provenance.json").read_text())
    more = "galleries/of-9 seed-42/episodes/vsr1-of-9 seed-42/episodes/rocchio-ft seed-42/first/engine-tuned "
    more += "seed-42/variants/gdpo/grpo/vsr1 seed-42/hqr seed-1/sft"
    added = {f"activitynet/{name}": {"minutes": 1} for name in more.split()}
    assert readme.paper_steps(origin | {"stages": origin["stages"] | added}) == origin["stages"]


def test_a_missing_video_is_named_and_its_queries_are_failures(made):
    clone, missing = made
    told = (clone / "runs/real/activitynet/videos/missing.csv").read_text().splitlines()
    assert told[1:] == [f"{missing},test,3"]
    numbers = json.loads((clone / "results/real/numbers.json").read_text())
    _, *lines = (
        (clone / "runs/real/activitynet/seed-42/episodes/vsr1/episodes.jsonl").read_text().splitlines()
    )
    assert len(lines) == numbers["T1/activitynet/vsr1/vr@1"]["n"] == 14
    for one in map(json.loads, lines):
        assert (one["turns"] == []) == (one["problem"] is not None) == (one["gt_video"] == missing), one
