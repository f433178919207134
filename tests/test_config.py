"""Profiles: what a person can get wrong in a yaml file, and what the message must name."""

import dataclasses
import json

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


def test_a_minimal_file_gets_the_defaults_and_its_own_name(tmp_path):
    profile = load(tmp_path, GOOD)
    assert (profile.name, profile.max_frames, profile.world) == ("mine", 64, None)


def test_an_unknown_knob_is_named(tmp_path):
    assert "'max_frame'" in refused(tmp_path, GOOD + "max_frame: 8\n")


def test_an_unknown_knob_of_the_world_is_named(tmp_path):
    assert "world" in (message := refused(tmp_path, GOOD + "world: {heigth: 3}\n")) and "'heigth'" in message


def test_a_missing_knob_is_named(tmp_path):
    assert "engine_large is missing" in refused(tmp_path, "datasets: [charades]\nengine: a\n")


def test_a_missing_knob_of_the_world_is_named(tmp_path):
    assert "test_videos is missing" in refused(tmp_path, GOOD + "world: {train_videos: 3}\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("video_fps: 1e-6", "expected float, found '1e-6' (str)"),  # yaml 1.1 reads 1e-6 as text
        ("seed: yes", "expected int, found True (bool)"),
        ("seed: 42.0", "expected int, found 42.0 (float)"),
        ("instruction: no", "expected str, found False (bool)"),
        ("max_frames: [64]", "expected int, found [64] (list)"),
        ("vr_ks: 10", "expected a list, found 10"),
        ("vr_ks: [1, five]", "expected int, found 'five' (str)"),
        ("world: 7", "expected a mapping, found 7"),
    ],
)
def test_a_wrong_type_names_the_key_and_what_was_found(tmp_path, line, expected):
    message = refused(tmp_path, GOOD + line + "\n")
    assert f": {line.split(':')[0]}: {expected}" in message


def test_a_list_becomes_a_tuple_and_a_whole_number_a_float(tmp_path):
    profile = load(tmp_path, GOOD + "vr_ks: [1, 2]\nvideo_fps: 2\n")
    assert profile.vr_ks == (1, 2) and profile.datasets == ("charades",)
    assert type(profile.video_fps) is float
    assert hash(profile) is not None, "a record with a list inside could not be hashed"


@pytest.mark.parametrize("text", ["datasets: [a", "just words", "", "- a\n- b\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    refused(tmp_path, text)


@pytest.mark.parametrize(
    "line", ["sft_warmup: 1.0", "sft_warmup: -0.1", "infonce_prefixes: [0, 2]", "infonce_prefixes: [2, -1]"]
)
def test_a_warm_up_or_a_depth_out_of_range_is_refused(tmp_path, line):
    """The library takes a warm-up from one on for steps; a depth below one would be another query."""
    assert line.split(":")[0] in refused(tmp_path, GOOD + line + "\n")


def test_an_unknown_data_set_in_a_profile_is_refused(tmp_path):
    assert "'charade'" in refused(tmp_path, GOOD.replace("charades", "charade"))


def test_an_unknown_profile_lists_those_that_exist():
    with pytest.raises(config.InputError, match="no such profile; there are mini, paper, paper-24gb, smoke"):
        config.load("maxi")


def test_the_digest_changes_with_every_knob_that_a_result_depends_on_and_with_no_other():
    profile = config.load("mini")
    for field in dataclasses.fields(profile):
        value = getattr(profile, field.name)
        other = dataclasses.replace(profile, **{field.name: None if value is not None else 0})
        assert (other.digest() == profile.digest()) is (field.name in config.NO_RESULT), field.name
    assert {"parallel_datasets", "decode_workers", "threads", "device"} < config.NO_RESULT


def test_the_committed_studies_belong_to_the_profile_that_ships():
    profile, studies = config.load("mini"), config.ROOT / "results" / "mini"
    kept = [*studies.glob("seeds/*.json"), *studies.glob("ablations/*.json")]
    assert len(kept) >= 12
    for path in kept:
        assert json.loads(path.read_text())["profile"] == profile.digest(), path.name


def test_a_seed_given_by_hand_wins_over_the_file():
    assert config.load("mini", 7).seed == 7 != config.load("mini").seed
    assert config.load("mini", 0).seed == 0, "zero is a seed"
