"""Where the checkout under test lies."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
VECTORS = ROOT / "tests/vectors"
"""Outputs of the official implementation."""
