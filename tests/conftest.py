"""What makes the suite quick without changing what it proves."""

import functools
import gc

import pytest
import torch
import torch._export.utils

import export.rounds

torch.set_num_threads(1)  # the networks are tiny: a second thread costs more than it computes
export.rounds.WARM_UP_SECONDS = 0.02  # and warm after ten runs, of which there are more anyway

# Every export lists the operators of torch again: once is enough.
_listed = torch._export.utils._collect_all_valid_cia_ops_for_namespace
torch._export.utils._collect_all_valid_cia_ops_for_namespace = functools.cache(_listed)

LONGEST = ("test_documents.py", "test_run.py", "test_bad_input.py", "test_verification.py", "test_frontier.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker waits for another at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


gc.freeze()  # the million objects of torch are not looked through for garbage again and again
