"""Fixtures of the tests of pages."""

from browsers import chromium

__all__ = ["chromium"]
