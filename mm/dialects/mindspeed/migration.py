"""A file of MindSpeed-MM's rewritten as one that needs nothing to be taken or refused here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mm.config.base import Section, parse, take_retired
from mm.dialects.mindspeed.accepted import Kind, Note, settle, value_at
from mm.dialects.mindspeed.data_json import ExtractData, TrainData
from mm.dialects.mindspeed.extract_files import ExtractModel, ExtractTools
from mm.dialects.mindspeed.inference_json import InferenceModel
from mm.dialects.mindspeed.inference_retired import RETIRED_INFERENCE_KEYS
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.dialects.mindspeed.retired_data import RETIRED, RETIRED_IN_EXTRACTION, RETIRED_IN_TRAINING
from mm.errors import ConfigError

_SECTIONS: Mapping[Kind, type[Section]] = {
    "data.json": ExtractData,
    "feature_data.json": TrainData,
    "pretrain_model.json": PretrainModel,
    "model_wan.json": ExtractModel,
    "tools.json": ExtractTools,
    "inference_model.json": InferenceModel,
}
_RETIRED: Mapping[Kind, Mapping[str, str]] = {
    "data.json": RETIRED | RETIRED_IN_EXTRACTION,
    "feature_data.json": RETIRED | RETIRED_IN_TRAINING,
    "inference_model.json": RETIRED_INFERENCE_KEYS,
}


@dataclass(frozen=True)
class Migrated:
    """A rewritten file.

    Attributes:
        kind: of file. values: its content.
        same: what is left out or spelled otherwise and means the same. lost: what is left out and meant something.
    """

    kind: Kind
    values: dict[str, Any]
    same: list[Note]
    lost: list[Note]


def migrated(values: Any, source: str) -> Migrated:
    """Rewrite a file's values, which stay as they are.

    Args:
        values: parsed JSON. source: what to call the file.

    Raises:
        ConfigError: CFG-192 for a file of no known kind; what `mm.config.base.parse` raises for the rest of it.
    """
    kind = _kind_of(values)
    if kind is None:
        found = f"{source} is none of MindSpeed-MM's files that are known: {', '.join(_SECTIONS)}."
        raise ConfigError("CFG-192", found, "Name one of these.")
    result, same = settle(values, kind)
    retired = _RETIRED.get(kind, {})
    held = {key: value_at(result, key) for key in retired}
    lost = [
        Note(key, held[key], problem.remedy.removesuffix("."))
        for problem in take_retired(result, retired, source)
        for key in [problem.message.split('"')[1]]
    ]
    parse(_SECTIONS[kind], result, source)
    return Migrated(kind, result, same, lost)


def _kind_of(values: Any) -> Kind | None:
    if not isinstance(values, dict):
        return None
    if "sorafeature" in values:
        return "tools.json"
    if "pipeline_class" in values or "pipeline_config" in values:
        return "inference_model.json"
    if "predictor" in values:
        return "pretrain_model.json"
    if "ae" in values:
        return "model_wan.json"
    if "dataset_param" not in values:
        return None
    param, basic = (value_at(values, f"dataset_param{rest}") for rest in (".dataset_type", ".basic_parameters"))
    stored = basic if isinstance(basic, dict) else {}
    of_features = param == "feature" or stored.get("data_storage_mode") == "sorafeatured"
    return "feature_data.json" if of_features else "data.json"
