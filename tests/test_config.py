"""Profiles: what a person can get wrong in a yaml file, and what the message must name."""

import dataclasses
import json
import os

import pytest

from vsr1 import config

GOOD = "datasets: [charades]\nengine: a\nengine_large: b\npolicy: c\n"


def load(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return config.load(str(path))


def refused(tmp_path, text):
    """The message of the error that `text` causes; always one line that names the file."""
    with pytest.raises(config.InputError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert "mine.yaml" in message and "\n" not in message
    return message


def test_every_shipped_profile_loads_and_differs_from_the_others():
    digests = {config.load(path.stem).digest() for path in (config.PACKAGE / "profiles").glob("*.yaml")}
    assert len(digests) == len(list((config.PACKAGE / "profiles").glob("*.yaml"))) >= 3


def test_the_noisy_profile_is_mini_with_another_engine():
    noisy, mini = config.load("mini-noisy"), config.load("mini")
    assert dataclasses.replace(noisy, name="mini", engine=mini.engine) == mini and noisy.engine != mini.engine


@pytest.mark.parametrize("name", ["paper", "paper-24gb"])
def test_a_gpu_machine_resizes_frames_in_several_threads(name):
    """One thread would bound the embedding of videos; which number it is changes no digest."""
    assert config.load(name).threads > 1
    assert dataclasses.replace(config.load(name), threads=1).digest() == config.load(name).digest()


def test_a_minimal_file_gets_the_defaults_and_its_own_name(tmp_path):
    profile = load(tmp_path, GOOD)
    assert (profile.name, profile.max_frames, profile.world) == ("mine", 64, None)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("max_frame: 8", "no such knob 'max_frame'"),
        ("world: {heigth: 3}", "world: no such knob 'heigth'"),
        ("world: {train_videos: 3}", "world: test_videos is missing"),
        (
            "video_fps: 1e-6",
            "video_fps: should be a valid number, found '1e-6'",
        ),  # yaml 1.1 reads 1e-6 as text
        ("seed: yes", "seed: should be a valid integer, found True"),
        ("seed: 42.0", "seed: should be a valid integer, found 42.0"),
        ("instruction: no", "instruction: should be a valid string, found False"),
        ("vr_ks: 10", "vr_ks: should be a valid array, found 10"),
        ("vr_ks: [1, five]", "vr_ks: 1: should be a valid integer, found 'five'"),
        ("world: 7", "world: should be an object, found 7"),
    ],
)
def test_an_unknown_missing_or_wrongly_typed_knob_is_named_with_what_was_found(tmp_path, lines, expected):
    assert f"mine.yaml: {expected}" in refused(tmp_path, GOOD + lines + "\n")


def test_a_list_becomes_a_tuple_and_a_whole_number_a_float(tmp_path):
    profile = load(tmp_path, GOOD + "vr_ks: [1, 2]\nvideo_fps: 2\n")
    assert profile.vr_ks == (1, 2) and profile.datasets == ("charades",)
    assert type(profile.video_fps) is float
    assert hash(profile) is not None, "a record with a list inside could not be hashed"


@pytest.mark.parametrize("text", ["datasets: [a", "just words", "", "- a\n- b\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    refused(tmp_path, text)


@pytest.mark.parametrize(
    "line",
    [
        *("eval_batch: 0", "seed: -1", "max_frames: 63", "val_fraction: 0", "rollout_temperature: 0.0"),
        *("dtype: fp8", "device: cuda:1", "disabled_rewards: [tyme]", "datasets: []", "vr_ks: [0]"),
        *("video_fps: .inf", "max_zero_std: 2", "sft_warmup: 1.0", "infonce_prefixes: [2, -1]", "engine: ''"),
        *("world: {train_videos: 3, test_videos: 0, foundation_videos: 1}", "two_stage: {epochs: 0}"),
        *("soft_token_bound: {train_queries: []}", "studies: {probe_steps: none}"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(tmp_path, line):
    key = line.split(":")[0]
    lines = [other for other in GOOD.splitlines() if not other.startswith(f"{key}:")]
    assert f"mine.yaml: {key}: " in refused(tmp_path, "\n".join([*lines, line]))


def test_an_unknown_data_set_in_a_profile_is_refused(tmp_path):
    assert "'charade'" in refused(tmp_path, GOOD.replace("charades", "charade"))


def test_an_unknown_profile_lists_those_that_exist():
    with pytest.raises(
        config.InputError, match="there are archives, mini, mini-noisy, paper, paper-24gb, smoke"
    ):
        config.load("maxi")


def test_the_digest_changes_with_every_knob_that_a_result_depends_on_and_with_no_other():
    profile = config.load("mini")
    for field in dataclasses.fields(profile):
        value = getattr(profile, field.name)
        other = dataclasses.replace(profile, **{field.name: f"{value}, changed"})
        assert (other.digest() == profile.digest()) is (field.name in config.NO_RESULT), field.name
    bound = dataclasses.replace(profile.soft_token_bound, n_soft=5)
    assert dataclasses.replace(profile, soft_token_bound=bound).digest() != profile.digest()
    assert {"parallel_steps", "decode_workers", "threads", "device"} < config.NO_RESULT


def test_the_digest_changes_when_a_model_is_trained_again_under_its_name(tmp_path):
    """Or numbers of the old model would stand in one table with those of the new one."""
    weights = tmp_path / "model.safetensors"
    profile = dataclasses.replace(config.load("mini"), policy=str(tmp_path))
    digests = []
    for content in (b"first", b"second", b"first"):
        weights.write_bytes(content)
        os.utime(weights, ns=(len(digests), len(digests)))
        digests.append(profile.digest())
    assert digests[0] == digests[2] != digests[1]


def test_a_new_knob_with_its_default_changes_no_digest():
    """Committed seeds and ablations stay valid when the code learns to do something more."""

    @dataclasses.dataclass(frozen=True)
    class Studies(config.StudyConfig):
        another: int = 1

    @dataclasses.dataclass(frozen=True)
    class Newer(config.Profile):
        a_new_knob: tuple[int, ...] = (1, 2)
        world_of_its_own: Studies = Studies()

    profile = config.load("smoke")
    knobs = {field.name: getattr(profile, field.name) for field in dataclasses.fields(profile)}
    studies = Studies(**dataclasses.asdict(profile.studies))
    assert Newer(**knobs | {"studies": studies}).digest() == profile.digest()
    assert Newer(**knobs, a_new_knob=(1,)).digest() != profile.digest()


def test_the_committed_studies_belong_to_the_profile_that_ships():
    for name in ("mini", "archives"):
        profile, results = config.load(name), config.ROOT / "results" / name
        studies = (
            path for study in ("seeds", "ablations", "premise") for path in results.glob(f"{study}/*.json")
        )
        for path in [*studies, *results.glob("seed-*.json")]:
            assert json.loads(path.read_text())["profile"] == profile.digest(), path


def test_a_seed_given_by_hand_wins_over_the_file():
    assert config.load("mini", 7).seed == 7 != config.load("mini").seed
    assert config.load("mini", 0).seed == 0, "zero is a seed"


@pytest.mark.parametrize(
    ("seed", "datasets", "expected"),
    [
        (None, (), "results/mini"),
        (42, ("activitynet", "charades", "didemo"), "results/mini"),
        (7, (), "runs/mini/results-seed7"),
        (None, ("charades",), "runs/mini/results-charades"),
        (7, ("didemo", "charades"), "runs/mini/results-charades-didemo-seed7"),
    ],
)
def test_a_run_of_another_seed_or_other_data_sets_reports_below_runs(seed, datasets, expected):
    profile = config.load("mini", seed, datasets)
    assert profile.results() == config.ROOT / expected
    assert set(profile.datasets) == set(datasets or config.DATASETS)
    if seed in (None, 42):
        assert profile.digest() == config.load("mini").digest(), "numbers of a data set count in both reports"


def test_a_private_file_with_the_name_of_a_profile_of_vsr1_is_refused(tmp_path):
    path = tmp_path / "mini.yaml"
    path.write_text(GOOD)
    with pytest.raises(config.InputError, match=r"mini.yaml: its results would replace .*; rename it"):
        config.load(str(path))
    assert config.load(str(config.PROFILES / "mini.yaml")) == config.load("mini")


def test_of_two_private_files_with_one_name_the_second_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "ROOT", tmp_path / "clone")
    paths = [tmp_path / folder / "mine.yaml" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text(GOOD)
        if path == paths[0]:
            config.claim(path)
            config.claim(path)
    with pytest.raises(config.InputError, match=r"b/mine.yaml: runs/mine belongs to .*a/mine.yaml"):
        config.claim(paths[1])
    paths[0].unlink()
    config.claim(paths[1])


def test_a_package_without_its_clone_says_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "PACKAGE", tmp_path / "vsr1")
    with pytest.raises(config.InputError, match="installed without its clone"):
        config.load("mini")
