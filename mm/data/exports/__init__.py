"""Stores of shards in formats of other programs: WebDataset, Parquet, and a table of what a store holds."""
