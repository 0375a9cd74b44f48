"""Whole models, unpatched and patched, on real text."""
