"""The version of this package, for every floor of it."""

__version__ = "0.1.0"
