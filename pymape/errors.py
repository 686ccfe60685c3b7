"""Errors that a caller may want to tell from others."""

__all__ = ["NotFinite", "NothingSelected"]


class NotFinite(ValueError):
    """A loss, a parameter or a model's output became NaN or infinite, as by too large a learning rate."""


class NothingSelected(ValueError):
    """Masks, or the search for them, leave nothing to train."""
