"""Stores in object storage as training opens them, beside the same stores on disk."""

from pathlib import Path
from typing import Any

import torch
from feature_stores import MODEL

from mm.config.run.data import FeatureSet
from mm.config.storage import Storage
from mm.data.dataset import FeatureDataset, open_features


def storage(tmp_path: Path, endpoint: str, **more: Any) -> Storage:
    values = {
        "cache": str(tmp_path / "cache"),
        "endpoint_url": endpoint,
        "give_up_after": 60.0,
        "request_timeout": 20.0,
    }
    return Storage(**{**values, **more})


def opened(url: str, how: Storage) -> FeatureDataset:
    return open_features(FeatureSet(path=url, storage=how), MODEL)


def samples(data: FeatureDataset) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    return [(data.name(i), data[i]["latents"], data[i]["prompt"]) for i in range(len(data))]


def assert_same(found: FeatureDataset, expected: FeatureDataset) -> None:
    assert len(found) == len(expected) > 3 and found.identity() == expected.identity()
    assert torch.equal(found.empty_prompt(), expected.empty_prompt())
    for (name, latents, prompt), (name2, latents2, prompt2) in zip(samples(found), samples(expected), strict=True):
        assert name == name2 and torch.equal(latents, latents2) and torch.equal(prompt, prompt2)


def from_disk(store: Path) -> FeatureDataset:
    return open_features(FeatureSet(path="data.jsonl", folder=str(store)), MODEL)
