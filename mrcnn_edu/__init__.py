"""Mask R-CNN, built piece by piece: the library of the book."""

__version__ = "0.1.0"
