"""What a file says about itself."""

from importlib import metadata

import pytest

from export.errors import NotExportable
from export.provenance import provenance, tool_version


def test_without_an_installation_the_version_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert tool_version() == "unknown"


@pytest.mark.parametrize(("about", "labels"), [({"a": "\udce9"}, None), ({}, ["\udce9"])])
def test_what_cannot_be_encoded_is_refused(about: dict[str, str], labels: list[str] | None) -> None:
    with pytest.raises(NotExportable, match="is not UTF-8"):
        provenance(about, labels, tolerance=1e-4, batches=(1,))


def test_keys_are_sorted_so_that_the_callers_order_does_not_matter() -> None:
    one = provenance({"b": "1", "a": "2"}, None, tolerance=1e-4, batches=(1,))
    two = provenance({"a": "2", "b": "1"}, None, tolerance=1e-4, batches=(1,))
    assert list(one.items()) == list(two.items())
    assert "labels" not in one
