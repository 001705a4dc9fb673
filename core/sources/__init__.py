"""Where comparisons come from, one file per kind of source."""

from .files import load_comparisons, read_rows

__all__ = ["load_comparisons", "read_rows"]
