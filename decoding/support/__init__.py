"""Helpers that command lines share: entry, settings, checks, files, progress, provenance."""
