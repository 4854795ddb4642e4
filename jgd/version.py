"""The version of jgd, below everything that records it."""

__all__ = ["__version__"]

__version__ = "0.2.0"
