"""pretrain_model.json, with MindSpeed-MM's names."""

from __future__ import annotations

from typing import Literal

from mm.config.base import Section
from mm.config.diffusion import DiffusionConfig
from mm.config.model import WanConfig
from mm.config.tasks.registry import TaskName


class PredictorConfig(WanConfig):
    """The `predictor` section of pretrain_model.json.

    Attributes:
        model_id: the one predictor there is.
        dtype: parameter precision; must agree with `--bf16`.
        pipeline_num_layers: blocks of each pipeline stage, [PP], or with virtual stages [VP][PP]; unused without a
            pipeline.
        attention_async_offload: what blocks that keep their attention keep waits for backward in host memory.
    """

    model_id: Literal["wandit"] = "wandit"
    dtype: Literal["bf16", "fp32"] | None = None
    pipeline_num_layers: list[int] | list[list[int]] | None = None
    attention_async_offload: bool = False

    def wan(self) -> WanConfig:
        """The model's shape alone."""
        return WanConfig.model_validate({name: getattr(self, name) for name in WanConfig.model_fields})


class PretrainModel(Section):
    """pretrain_model.json.

    Attributes:
        task: what is trained; where it is said, it must be that of the predictor.
        load_video_features, load_text_features: training always reads extracted features.
        predictor: the transformer. diffusion: noise schedule and loss.
    """

    task: TaskName | None = None
    load_video_features: Literal[True] = True
    load_text_features: Literal[True] = True
    predictor: PredictorConfig
    diffusion: DiffusionConfig
