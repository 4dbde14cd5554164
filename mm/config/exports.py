"""Formats that feature stores are exported to."""

from typing import Literal

ExportFormat = Literal["webdataset", "parquet", "listing"]
