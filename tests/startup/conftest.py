import pytest


@pytest.fixture(autouse=True)
def world(monkeypatch):
    """None but what a test says."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
