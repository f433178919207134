"""The order of the files: `make test` deals them to two workers, of which none should work alone at the end.

And the families of corpora that tests make up without scenes.
"""

import pytest

from vsr1.data import source

LONG = (
    "test_real_paper",
    "test_notebooks",
    "test_grpo",
    "test_sft",
    "test_distributed",
    "test_gpu",
    "test_speed",
)


def pytest_collection_modifyitems(items):
    """Put files that take a minute first, the longest before the others."""
    rank = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))  # stable


@pytest.fixture(autouse=True, scope="session")
def made_up_corpora_know_no_families():
    """Intervals on made-up episodes of a rendered profile draw videos, for nobody wrote their scenes."""
    families = source.families

    def known(profile, dataset):
        scenes = profile.data_dir(dataset) / "corpus" / "scenes.jsonl"
        return families(profile, dataset) if scenes.exists() or profile.world is None else {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "families", known)
        yield
