"""Fixtures that several files share: a corpus and a checkpoint."""

import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.runs import write_corpus
from tests.distributed.toy_run import save_run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Return the prefix of a small corpus."""
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return the output directory of a toy run, saved by two pipeline ranks."""
    output = tmp_path_factory.mktemp("run")
    run_ranks(2, save_run, output, (1, 2))
    return output
