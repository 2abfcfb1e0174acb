"""The rooms of the house: their names hide no module that is installed."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder

import pytest

from tests.checkout import ROOT


@pytest.mark.parametrize("package", ["pipeline", "captioning", "training"])
def test_no_room_hides_an_installed_module(package: str) -> None:
    """A script's own folder comes first on the path: `composer training/train.py`."""
    # Installed ones: `make demo` leaves a folder data/ in the checkout.
    elsewhere = [path for path in sys.path if "site-packages" in path or "lib/python" in path]
    assert elsewhere
    names = {path.stem for path in (ROOT / package).iterdir() if path.suffix in ("", ".py")}
    hidden = {
        name
        for name in names - {"__init__", "__pycache__"}
        if PathFinder.find_spec(name, elsewhere)
    }
    assert not hidden
