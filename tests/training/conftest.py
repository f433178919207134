"""What tests of both stages share: a random engine, and vectors of six videos."""

import pytest
from tiny import random_engine, random_vectors


@pytest.fixture(scope="session")
def search():
    return random_engine()


@pytest.fixture(scope="session")
def vectors():
    return random_vectors()
