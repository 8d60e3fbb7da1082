"""The version, in a module that imports nothing: all parts of the package may import it."""

__version__ = "0.1.0"
