"""Answers about a run before it starts or beside it: dry run, parity, preflight, comparison, plots."""
