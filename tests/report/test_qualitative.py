"""The page of cards, made of six searches whose course is written down here, and looked at in a real browser."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import av
import browser
import numpy as np
import pytest
from fake import profile as fake_profile
from fake import record

from vsr1.config import InputError
from vsr1.data import annotations, previews, video_reader
from vsr1.experiments import common
from vsr1.loop import episode, records, replies
from vsr1.loop.records import Cost, Ranking, Refinement, Verification
from vsr1.mini import renderer, world
from vsr1.report import html_report, qualitative

HOSTILE = '<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">'
# Per query the rank of the right video at first, and after any refinement by each system; its outcome by hand.
PLAN = [
    (1, {"sqr": 1, "hqr-blind": 1, "hqr-seen": 1, "hqr-reasoned": 1}, "kept"),
    (3, {"sqr": 1, "hqr-blind": 2, "hqr-seen": 3, "hqr-reasoned": 4}, "sqr"),
    (2, {"sqr": 2, "hqr-blind": 3, "hqr-seen": 1, "hqr-reasoned": 3}, "hqr"),
    (4, {"sqr": 1, "hqr-blind": 2, "hqr-seen": 2, "hqr-reasoned": 1}, "both"),
    (5, {"sqr": 2, "hqr-blind": 4, "hqr-seen": 5, "hqr-reasoned": 6}, "none"),
    (1, {"sqr": 1, "hqr-blind": 4, "hqr-seen": 1, "hqr-reasoned": 1}, "harmed"),  # blind rejects it
]


def walked(queries, videos, system):
    """Episodes of one system that follow PLAN, through the loop itself."""

    def search(pairs):
        found = []
        for query, state in pairs:
            first, after, _ = PLAN[query.id]
            rank = first if state is records.ORIGINAL else after[system]
            top = [video for video in videos if video != query.video]
            top.insert(rank - 1, query.video)
            found.append(Ranking(rank, 0, tuple(top), 0.5, 0.9))
        return found

    def ask(pairs):
        looks = []
        for query, video in pairs:
            good = video == query.video and not (query.id == 5 and system == "hqr-blind")
            said = f"<answer>matched</answer> <start>{query.span[0]}</start> <end>{query.span[1] + 1}</end>"
            text = f"<think> {HOSTILE}. shirt red - blue no. </think> "
            text += said if good else "<answer>not_matched</answer>"
            looks.append(Verification(replies.read_reply(text, [len(system), query.id]), 60.0, Cost()))
        return looks

    def refine(rejected):
        words = None if system == "sqr" else f"someone else {HOSTILE}"
        return [Refinement(system, "again", 8, 9, words) for _ in rejected]

    run = records.Run("charades", "test", system, 3, 1, 42)
    return run, episode.run_episodes(queries, search, ask, refine, run)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six rendered videos, a hostile query among those about them, and the searches of PLAN, as files."""
    with pytest.MonkeyPatch.context() as patch:
        run = record(fake_profile(tmp_path_factory.mktemp("cards"), patch))
        home, data = run.runs("charades"), run.data_dir("charades")
        for path in (data / "corpus", data / "videos", home / "episodes"):
            path.mkdir(parents=True)
        scenes = renderer.write_corpus(data / "corpus", "charades", {"test": 6}, run.world.seed)
        for scene in scenes:
            renderer.render_video(
                scene,
                data / "videos" / f"{scene.video}.mp4",
                64,
                2 * previews.FPS,
            )
        first = {query.video: query for query in annotations.read_fig(data / "corpus" / "test.jsonl")}
        queries = [replace(query, id=n) for n, query in enumerate(first.values())]
        queries[1] = replace(queries[1], text=f"{queries[1].text} {HOSTILE}")
        annotations.write_fig(data / "corpus" / "test.jsonl", queries)
        for system, (name, _) in qualitative.SYSTEMS.items():
            path = home / "episodes" / f"{name}.jsonl"
            records.write_episodes(path, *walked(queries, sorted(first), system))
        yield run


@pytest.fixture(scope="module")
def made(run):
    return qualitative.make(run, "charades")


class Reading(HTMLParser):
    """What a browser would see: per card its attributes, count of turns, text; tags that ought not to be in cards."""

    def __init__(self, text):
        super().__init__()
        self.cards, self.stray, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "article" and "id" in given:  # not the sample
            self.cards.append(given | {"turns": Counter(), "text": "", "marks": []})
            self.inside = True
        if self.inside:
            self.stray += [tag] * (
                tag in ("script", "video", "iframe") or any(k.startswith("on") for k in given)
            )
            system = given.get("class", "").removeprefix("turn ") if tag == "li" else None
            self.cards[-1]["turns"].update([system] if system else [])
            self.cards[-1]["marks"] += [""] if tag == "mark" else []
            self.marking = tag == "mark"

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "article"
        self.marking = False

    def handle_data(self, data):
        if self.inside:
            self.cards[-1]["text"] += data
            if self.marking:
                self.cards[-1]["marks"][-1] += data


@pytest.fixture(scope="module")
def seen(made):
    return {card["id"]: card for card in Reading((made / "index.html").read_text()).cards}


def test_what_a_hostile_caption_or_reply_says_is_shown_and_not_run(made, seen):
    text = (made / "index.html").read_text()
    assert Reading(text).stray == [] and text.count("<script") == 1
    assert seen["charades-1"]["text"].count(HOSTILE) > 3  # query, replies, rewrites


def test_a_false_statement_is_struck_through_wherever_its_reply_is_shown(run, made):
    scenes, told = world.read_scenes(run.data_dir("charades") / "corpus"), []
    for search in qualitative.searches(run, "charades"):
        for turn in (turn for one in search.values() for turn in one.turns):
            episode = search["sqr"]
            (asked,) = [
                m for m in scenes[episode.gt_video].moments if m.start * 1000 == episode.gt_span_ms[0]
            ]
            shirt = scenes[turn.shown_id].moments[0].shirt  # the same all along
            false = asked.shirt != "red" or shirt != "blue" or asked.shirt == shirt
            reply = qualitative.marked_reply(run, "charades", episode, turn)
            assert ("~~shirt red - blue no.~~" in reply) == false
            assert (f"[{asked.shirt} is asked for" in reply) == (asked.shirt != "red")
            assert (f"{shirt} is shown" in reply) == (shirt != "blue")
            told.append(false)
    assert any(told)
    page = (made / "index.html").read_text()
    cards = json.loads((made / "cards.json").read_text())["cards"]
    replies = [r for card in cards for groups in card["turns"] for group in groups for r in group["replies"]]
    shown = [reply for reply in replies if not reply["reused"] and not reply["same"]]
    assert page.count("<del>shirt red") == sum(bool(errors) for one in shown for *_, errors in one["steps"])


def test_every_card_has_every_turn_of_every_system(run, seen):
    assert len(seen) == len(PLAN)
    for walk in qualitative.searches(run, "charades"):
        turns = {system: len(one.turns) for system, one in walk.items()}
        assert seen[f"charades-{walk['sqr'].desc_id}"]["turns"] == turns
    assert sum(sum(card["turns"].values()) for card in seen.values()) > 40


def test_outcomes_are_those_of_the_plan_and_of_the_files(run, made, seen):
    assert {card["id"]: card["data-outcome"] for card in seen.values()} == {
        f"charades-{n}": kind for n, (_, _, kind) in enumerate(PLAN)
    }
    raw = Counter()  # once more from the text of the files, by the last rank that stands in each line
    lines = [
        (run.runs("charades") / "episodes" / f"{name}.jsonl").read_text().splitlines()[1:]
        for name, _ in qualitative.SYSTEMS.values()
    ]
    for rows in zip(*[map(json.loads, file) for file in lines], strict=True):
        soft, *hard = (
            [row["rank_orig"], *(t["rank_out"] for t in row["turns"] if t["rank_out"])][-1] == 1
            for row in rows
        )
        after = ("both" if any(hard) else "sqr") if soft else ("hqr" if any(hard) else "none")
        raw[after if rows[0]["rank_orig"] > 1 else "kept" if soft and all(hard) else "harmed"] += 1
    table = re.findall(r'<button type="button" value="(\w+)".*?><b>(\d+)<', (made / "index.html").read_text())
    assert {kind: int(count) for kind, count in table} == dict(raw)


def test_the_page_opens_with_one_card_of_each_outcome(made):
    order = [card["data-outcome"] for card in Reading((made / "index.html").read_text()).cards]
    assert order == [kind for kind in qualitative.OUTCOMES if kind in order]
    parts = [
        {"cards": [{"outcome": kind, "n": n} for n, kind in enumerate(kinds)]}
        for kinds in (["sqr"] * 3 + ["none"], ["none", "sqr"])
    ]
    assert [(c["outcome"], c["n"]) for c in qualitative.mixed(parts)] == [
        ("sqr", 0), ("none", 3), ("sqr", 1), ("none", 0), ("sqr", 1), ("sqr", 2)
    ]  # fmt: skip


def test_what_differs_in_the_video_found_first_is_marked_in_the_query(run, seen):
    scenes = world.read_scenes(run.data_dir("charades") / "corpus")
    walk = next(walk for walk in qualitative.searches(run, "charades") if walk["sqr"].desc_id == 1)
    one, wrong = walk["sqr"], walk["sqr"].turns[0].shown_id
    asked = qualitative.find_query_moment(one, scenes)
    nearest = min(
        scenes[wrong].moments,
        key=lambda m: sum(a != b for a, b in zip(m.attributes(), asked.attributes(), strict=True)),
    )
    told = common.differences(
        replace(scenes[wrong], moments=(asked,)), replace(scenes[wrong], moments=(nearest,))
    )
    named = [line.split(": ")[1].split()[0] for line in told if " start " not in line and " end " not in line]
    phrases = {qualitative.phrase(name, asked).lower() for name in named}
    assert phrases and {mark.lower() for mark in seen["charades-1"]["marks"]} == phrases


def test_without_scenes_words_are_marked_that_no_rewrite_kept(run, tmp_path):
    real = replace(run, world=None)
    walk = qualitative.searches(run, "charades")[1]
    part = {
        "dataset": "charades",
        "queries": 6,
        "cards": [qualitative.Cards(real, "charades", {}).card(walk)],
    }
    (card,) = Reading(qualitative.page(real, [part])).cards
    words = set(re.findall(r"\w{3,}", walk["sqr"].query)) - {"someone", "else", *re.findall(r"\w+", HOSTILE)}
    assert words and set(card["marks"]) >= words and "cannot be read" in card["text"]


def test_a_missing_file_is_named_in_one_line(run, tmp_path):
    path = run.runs("charades") / "episodes" / "hqr-seen-sample.jsonl"
    shutil.move(path, tmp_path / "kept")
    try:
        with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: not there; run notebook .*$"):
            qualitative.searches(run, "charades")
    finally:
        shutil.move(tmp_path / "kept", path)


def test_a_query_that_one_system_lacks_is_named(run, tmp_path):
    path = run.runs("charades") / "episodes" / "vsr1.jsonl"
    whole = path.read_text()
    kept = records.read_episodes(path)[:-1]
    try:
        records.write_episodes(path, kept[0].run, kept)
        with pytest.raises(InputError, match="query 5 is not in it"):
            qualitative.searches(run, "charades")
    finally:
        path.write_text(whole)


def test_a_film_is_small_h264_and_shows_the_same_at_the_same_second(run, made):
    source = next((run.data_dir("charades") / "videos").glob("*.mp4"))
    small = made / "charades" / source.name
    with av.open(str(small)) as box:
        assert box.streams.video[0].codec_context.name == "h264"
    assert small.stat().st_size < source.stat().st_size
    whole, copy = (video_reader.Reader().read(path, np.arange(20.0)) for path in (source, small))
    assert abs(whole.seconds - copy.seconds) <= 1 / previews.FPS
    errors = np.abs(copy.frames[:, None].astype(int) - whole.frames[None]).mean(axis=(2, 3, 4))  # (20, 20)
    over = errors - errors.min(axis=1, keepdims=True)  # how much worse than the second that fits best
    assert np.diag(over).max() < 0.5 and np.diag(over, 1).max() > 3  # a second off would be noticed


def test_a_film_whose_clock_begins_late_is_the_same(run, made, tmp_path):
    source = next((run.data_dir("charades") / "videos").glob("*.mp4"))
    with av.open(str(source)) as box, av.open(str(tmp_path / "late.mkv"), "w") as late:
        copy = late.add_stream_from_template(box.streams.video[0])
        for packet in box.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts = (
                    stamp + int(5 / packet.time_base) for stamp in (packet.pts, packet.dts)
                )
                packet.stream = copy
                late.mux(packet)
    with video_reader.Reader() as reader:
        clip = reader.read(tmp_path / "late.mkv")
        assert previews.film(reader, tmp_path / "late.mkv", clip, tmp_path / "late.mp4") is None
    with av.open(str(tmp_path / "late.mkv")) as box:
        assert next(box.decode(video=0)).time >= 5
    films = made / "charades" / source.name, tmp_path / "late.mp4"
    seen = [video_reader.Reader().read(path, np.arange(10.0)) for path in films]
    np.testing.assert_array_equal(*(clip.frames for clip in seen))


def test_a_strip_shows_the_frame_of_each_time_it_names(run, made):
    films = json.loads((made / "films.json").read_text())
    source = next((run.data_dir("charades") / "videos").glob("*.mp4"))
    clip = video_reader.Reader().read(source)
    picture, times = previews.strip(clip)
    assert times == films[source.stem]["times"] and len(times) == previews.STRIP
    width = picture.width // previews.STRIP
    for place, time in enumerate(times):
        tile = np.asarray(
            picture.crop((place * width, 0, (place + 1) * width, picture.height)).resize((64, 64))
        )
        errors = np.abs(clip.frames.astype(int) - tile).mean(axis=(1, 2, 3))
        assert errors[np.flatnonzero(clip.timestamps == time)[0]] < errors.min() + 0.5 and errors.max() > 5
        assert abs(time - (place + 0.5) / previews.STRIP * clip.seconds) <= 0.5  # it was seen every second


def test_an_unreadable_video_has_no_film_and_its_card_says_why(run, tmp_path):
    folder = run.data_dir("charades") / "videos"
    source = next(folder.glob("*.mp4")).read_bytes()
    start, end = source.index(b"mdat") + 2000, source.index(b"moov") - 4
    torn = source[:start] + bytes(end - start) + source[end:]
    bad = {"bad": b"no film", "torn": torn}
    for name, content in bad.items():
        (folder / f"{name}.mp4").write_bytes(content)
    previews.make(folder, [*bad, "nowhere"], tmp_path, "charades")
    for name in bad:
        (folder / f"{name}.mp4").unlink()
    films = json.loads((tmp_path / "films.json").read_text())
    assert films["nowhere"]["problem"] == "no such file" and films["bad"]["problem"]
    assert films["torn"]["problem"].startswith("damaged data from second 0.")
    assert list((tmp_path / "charades").iterdir()) == []
    clip = qualitative.Cards(run, "charades", films).clip("bad", 0, [("right", (0, 1000))])
    assert clip["problem"] == films["bad"]["problem"] and clip["bands"] == []


def test_the_report_links_to_the_page_and_what_is_real_stays_out_of_results(run, made):
    html_report.publish(run)
    copied = run.results() / "qualitative"
    assert 'href="qualitative/index.html"' in (run.results() / "report.html").read_text()
    linked = re.findall(r'(?:src|href)="(charades/[^"#]+)', (copied / "index.html").read_text())
    assert linked and all((copied / name).is_file() for name in linked)
    assert {p.name for p in (copied / "charades").iterdir()} == {name.split("/")[1] for name in linked}
    real = replace(run, world=None)
    assert qualitative.pages(real) == []  # those cards were made with other knobs
    qualitative.make(real, "charades")
    assert qualitative.pages(real) == [made / "index.html"] and qualitative.publish(real) == []
    qualitative.make(run, "charades")


def test_films_of_data_sets_that_were_not_run_stay(run, made):
    kept = run.results() / "qualitative" / "didemo" / "kept.mp4"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(b"of an earlier run")
    qualitative.publish(run)
    assert kept.exists()
    kept.unlink()


# --- In a browser


@pytest.fixture(scope="module")
def tab(made, tmp_path_factory):
    if browser.CHROMIUM is None:
        pytest.skip("no chromium is installed; the page is not looked at")
    with browser.chromium(tmp_path_factory.mktemp("chromium")) as tab:
        tab.address = (made / "index.html").as_uri()
        tab.open(tab.address)
        yield tab


VISIBLE = "[...document.querySelectorAll('main article')].filter(card => card.checkVisibility())"


def choose(tab, name, value):
    """Set a control of the form as a person would."""
    tab.run(
        f"form.elements.{name}.value = {json.dumps(value)}, "
        f"form.elements.{name}.dispatchEvent(new Event('input', {{bubbles: true}}))"
    )


def test_the_page_loads_from_disk_without_errors_and_runs_no_caption(tab):
    assert tab.run(f"{VISIBLE}.length") == len(PLAN) and tab.run("typeof window.hacked") == "undefined"
    tab.wait("[...document.images].slice(0, 2).every(image => image.naturalWidth)")
    outside = "performance.getEntriesByType('resource').filter(one => !one.name.startsWith('file:'))"
    assert tab.run(f"{outside}.length") == 0 and tab.problems == []


def test_filters_and_search_change_the_count(tab):
    for kind in qualitative.OUTCOMES:
        count = f"document.querySelector('#counts button[value={kind}]')"
        tab.run(f"{count}.click()")
        assert tab.run(f"{VISIBLE}.length") == int(tab.run(f"{count}.textContent").split()[0]) == 1
        assert tab.run("document.querySelector('output').value") == f"1 of {len(PLAN)} cards"
    tab.run(f"{count}.click()")  # once more: all of them
    choose(tab, "words", "WINDOW.hacked = 1</script>")
    assert tab.run(f"{VISIBLE}.length") == len(PLAN)  # in all replies
    choose(tab, "words", "nobody says this")
    assert tab.run(f"{VISIBLE}.length") == 0
    choose(tab, "words", "")
    tab.run("document.querySelector('#counts button[value=none]').click()")
    assert tab.run(f"{VISIBLE}[0].id") == "charades-4" and tab.run(f"{VISIBLE}.length") == 1
    tab.run("document.querySelector('#counts button[value=none]').click()")


def test_cards_are_sorted_by_rank_gain(tab):
    gains = {
        f"charades-{n}": first - after["sqr"] * (first > 1) - (first == 1)
        for n, (first, after, _) in enumerate(PLAN)
    }
    for sort, sign in (("gain", 1), ("-gain", -1)):
        choose(tab, "sort", sort)
        order = tab.run(f"{VISIBLE}.map(card => card.id)")
        values = [sign * gains[card] for card in order]
        assert values == sorted(values, reverse=True) and len(set(values)) > 2


def test_a_link_opens_its_card_whatever_the_filter_says(tab):
    tab.run("document.querySelector('#counts button[value=none]').click()")
    tab.run("location.hash = '#charades-3'")
    tab.wait("document.activeElement.id === 'charades-3'")
    assert tab.run("document.activeElement.querySelector('details').open")
    tab.open(f"{tab.address}#charades-2")
    tab.wait("document.activeElement.id === 'charades-2'")
    box = tab.run("(({top}) => [top, innerHeight])(document.activeElement.getBoundingClientRect())")
    assert 0 <= box[0] < box[1]
    assert tab.run("document.querySelectorAll('details[open]').length") == 1


def test_a_clip_plays_from_its_moment_by_the_keyboard_alone(tab):
    tab.open(tab.address)
    tab.key("j")
    tab.wait("document.activeElement === document.querySelector('main article')")
    tab.key("j")
    assert tab.run("document.activeElement === document.querySelectorAll('main article')[1]")
    tab.key("k")
    for way, place in ((1, 1), (1, 2), (-1, 1), (-1, 0)):  # the same by the buttons
        tab.run(f"document.querySelector('body > nav button[value=\"{way}\"]').click()")
        assert tab.run(f"document.activeElement === document.querySelectorAll('main article')[{place}]")
    tab.run("document.activeElement.querySelector('a.clip').focus()")
    start = tab.run("Number(document.activeElement.href.split('#t=')[1])")
    tab.key("Enter")
    tab.wait(f"document.querySelector('video')?.currentTime > {start} + 0.3")
    assert tab.run("document.querySelector('video').videoWidth") == 64 and start > 0
    tab.run("play(document.querySelector('video').previousElementSibling)")
    assert tab.run("document.querySelector('video')") is None and tab.problems == []
