"""The module that a profile names provides its data."""

import dataclasses

import pytest

from vsr1 import config
from vsr1.config import InputError
from vsr1.data import real_datasets, source


def named(module):
    return dataclasses.replace(config.load("paper"), data_source=module)


def test_a_profile_of_real_videos_gets_them_from_files():
    assert source.of(config.load("paper")) is real_datasets
    assert real_datasets.reply_writer(config.load("paper"), "charades") is None


@pytest.mark.parametrize("module", ["vsr1.data.nowhere", "nowhere.at.all"])
def test_a_module_that_does_not_exist_is_named(module):
    with pytest.raises(InputError, match=f"paper: data_source: no module '{module}'"):
        source.of(named(module))


def test_a_source_that_knows_no_families_names_none():
    assert source.families(config.load("paper"), "charades") == {}
    assert not source.has_families(config.load("paper")) and source.has_families(config.load("mini"))


def test_a_module_without_the_two_functions_is_named():
    with pytest.raises(InputError, match=r"vsr1\.data\.annotations has no prepare\(\)"):
        source.of(named("vsr1.data.annotations"))


def test_what_such_a_module_lacks_itself_is_no_fault_of_the_profile(tmp_path, monkeypatch):
    (tmp_path / "lacks_something.py").write_text("import nothing_of_that_name")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_that_name"):
        source.of(named("lacks_something"))
