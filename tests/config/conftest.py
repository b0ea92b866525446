"""Megatron reads the source of its config classes anew for every parser; here hundreds of parsers are built."""

import functools

import pytest
from megatron.training.argument_utils import ArgumentGroupFactory


@pytest.fixture(autouse=True, scope="session")
def docstrings_are_read_once():
    reader = object.__new__(ArgumentGroupFactory)
    read = functools.cache(ArgumentGroupFactory._get_field_docstrings.__get__(reader))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArgumentGroupFactory, "_get_field_docstrings", lambda self, source: dict(read(source)))
        yield
