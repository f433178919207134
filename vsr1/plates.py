"""Searches chosen by rule, drawn as in the paper: `page` puts them into results/<profile>/figures/."""

from pathlib import Path

from vsr1.params import Profile


def publish(profile: Profile) -> list[Path]:
    """None yet."""
    return []
