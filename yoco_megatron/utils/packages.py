"""Installed packages, of which none is imported."""

import importlib.metadata
import importlib.util
from pathlib import Path


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution, from its metadata; None if there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_dir(module: str) -> Path | None:
    """Folder of a top-level package; None if there is none."""
    spec = importlib.util.find_spec(module)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None
