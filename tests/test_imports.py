"""Imports without collections: faster, and nothing of a later run is kept for ever."""

import gc
import subprocess
import sys

from conftest import REPOSITORY

from tinyllm.imports import without_collections


def test_once_the_libraries_are_there_nothing_is_frozen():
    import transformers  # noqa: F401

    before = gc.get_freeze_count()
    with without_collections():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_the_first_time_what_was_imported_is_frozen():
    code = """
import gc
from tinyllm.imports import without_collections
try:
    with without_collections():
        assert not gc.isenabled()
        import decimal
        raise KeyError
except KeyError:
    pass
assert gc.isenabled() and gc.get_freeze_count() > 1000
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
