"""Check what the replies of the mini policies say of rendered videos, before any training on a data set.

`python -m benchmarks.replies` writes vsr1/mini/weights/replies.json.

Windows are judged by queries that fit, or differ in one attribute from what they show. They are of videos that the
policies were pretrained on (the foundation split), and of some that they never saw (the train split).
"""

import re
from dataclasses import asdict

import numpy as np
import torch

from vsr1 import cache, config
from vsr1.config import Profile
from vsr1.loop import moments, replies
from vsr1.mini import captions, pretraining, pretraining_data, teacher
from vsr1.mini.pretraining_data import FoundationVideos
from vsr1.mini.world import ATTRIBUTES, Moment
from vsr1.models import checkpoints, prompt_text

FILE = pretraining.WEIGHTS / "replies.json"
WINDOWS, FRAMES = 192, (24, 64)  # of a data set; fewest and most frames of one
BATCH = 24


def main() -> None:
    """Write a row for each shipped policy, data set and kind of videos to `FILE`.

    right, wrong  percent right verdicts on windows that fit the query, and on those that differ in one attribute
    false_yes     percent of the attributes that differ which the reply calls the same
    read          percent of the attributes that differ of which it names what is shown
    found         percent of right acceptances that name the moment, IoU 0.5
    """
    profile, recipes = config.load("mini"), pretraining.read_recipes()
    names = [recipe.ships for recipe in recipes.values() if recipe.ships.startswith("policy")]
    splits = {"pretrained on": "foundation", "new": "train"}
    videos = {kind: pretraining_data.load_videos(profile, split) for kind, split in splits.items()}
    rows = [
        {"policy": name, "videos": kind, "dataset": dataset, "windows": WINDOWS}
        | numbers(profile, str(pretraining.WEIGHTS / name), videos[kind], dataset)
        for name in names
        for kind in videos
        for dataset in profile.datasets
    ]
    cache.write_json(FILE, rows)


@torch.no_grad()
def numbers(
    profile: Profile, weights: str, videos: FoundationVideos, dataset: str
) -> dict[str, float | None]:
    """Return the numbers of `main` for one policy and data set; None of what no reply says anything about."""
    policy, rng = checkpoints.load(weights, profile), np.random.default_rng(5)
    settings = policy.model.config.vision_config, profile.max_frame_pixels
    examples = pretraining_data.Examples(videos, policy.tokenizer, *settings)
    prompts, facts = [], []
    while len(prompts) < WINDOWS:
        clip, query_moment, shown = _draw(examples, dataset, len(prompts) % 2 == 1, rng)
        query = captions.caption(query_moment, int(rng.integers(captions.STYLES)))
        prompts.append(policy.prompt(prompt_text.SYSTEM_ZS, query, clip))
        facts.append((query_moment, shown))
    said = {"right": [], "wrong": [], "false_yes": [], "read": [], "found": []}
    for start in range(0, WINDOWS, BATCH):
        part = slice(start, start + BATCH)
        completions = policy.reply(prompts[part], max_new_tokens=profile.max_new_tokens)
        for completion, (query_moment, shown) in zip(completions, facts[part], strict=True):
            reply = replies.read_reply(completion.text, completion.ids, ended=completion.ended)
            for name, value in outcomes(reply, query_moment, shown):
                said[name].append(value)
    return {name: round(100 * float(np.mean(values)), 1) if values else None for name, values in said.items()}


def _draw(examples, dataset, wrong, rng):
    """Draw (window, the moment asked for, the moment of the window that has most of it)."""
    while True:
        count = int(rng.integers(FRAMES[0] // 2, FRAMES[1] // 2 + 1)) * 2
        number, clip, shown = examples.printed_window(count, rng)
        if examples.videos.datasets[number] != dataset:
            continue
        query_moment = shown[int(rng.integers(len(shown)))]
        if wrong:
            query_moment = pretraining_data.change(query_moment, dataset, [str(rng.choice(ATTRIBUTES))], rng)
        if wrong != (query_moment.attributes() in {moment.attributes() for moment in shown}):
            return clip, query_moment, teacher.closest(query_moment, shown)


def outcomes(reply: replies.Reply, query_moment: Moment, shown: Moment) -> list[tuple[str, bool]]:
    """Return (name of a number of `main`, whether it is so) of all that a reply says."""
    fits = query_moment.attributes() == shown.attributes()
    said = [("right" if fits else "wrong", reply.matched is fits)]
    if fits and reply.matched and reply.span:
        said.append(("found", bool(moments.span_iou(reply.span, (shown.start, shown.end)) >= 0.5)))
    reasoning = reply.text.partition("</think>")[0].replace("<think>", "")
    for step in re.split(r"(?<=\.) ", reasoning.strip()):
        statement = teacher.read_statement(step)
        if statement and asdict(query_moment)[statement.attribute] != asdict(shown)[statement.attribute]:
            said.append(("false_yes", statement.same))
            said.append(("read", statement.shown_word == teacher.word(statement.attribute, shown)))
    return said


if __name__ == "__main__":
    main()
