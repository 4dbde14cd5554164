"""Imported by the fork server alone, before all else, which found this package through PYTHONPATH."""

from mm.isolated import clean_path

clean_path()
