"""The order of the files: `make test` deals them to two workers, of which none should work alone at the end."""

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
