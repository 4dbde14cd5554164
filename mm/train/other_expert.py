"""The expert that a run does not train, where clips that it renders ask both: read for a rendering and let go of."""

from __future__ import annotations

from dataclasses import dataclass

from mm.checkpoint.mismatch import Expected
from mm.config.run.training import TrainingRun
from mm.generate.experts import TwoExperts, require_experts_in_place
from mm.generate.pipeline import Velocity
from mm.generate.render import Processes
from mm.generate.weights import GenerationWeights, open_generation_weights
from mm.parallel.apply import apply_frozen
from mm.parallel.velocity import ParallelVelocity
from mm.train.run import training_dtype


@dataclass(frozen=True)
class OtherExpert:
    """One of two experts, whose weights nobody trains.

    Attributes:
        weights: opened and checked. boundary: noise level between it and the one in training.
        is_high: whether it is the one for much noise.
    """

    weights: GenerationWeights
    boundary: float
    is_high: bool

    def beside(self, trained: Velocity, sections: TrainingRun, processes: Processes) -> TwoExperts:
        """The velocity of both; every rank calls it. The memory is held for as long as the result is.

        Args:
            trained: velocity of the expert in training. sections, processes: of that.
        """
        place = sections.wan, processes.mesh, processes.backend, training_dtype(sections)
        own = ParallelVelocity(apply_frozen(*place, self.weights.value_of, sections.parallel.layerzero))
        return TwoExperts(own, trained, self.boundary) if self.is_high else TwoExperts(trained, own, self.boundary)


def open_other_expert(sections: TrainingRun, processes: Processes) -> OtherExpert | None:
    """Open the weights that `validation.other_expert` names; no tensor is read. None where it names none.

    Args:
        sections: a run of one expert, accepted by `mm.config.rules.experts`. processes: where it runs.

    Raises:
        ConfigError: CFG-316 for weights of another model, CFG-295 for those of the expert in training.
        CheckpointError, DataError: what `mm.generate.weights.open_generation_weights` raises.
    """
    path = None if sections.validation is None else sections.validation.other_expert
    if path is None:
        return None
    low, high = sections.objective.band_from, sections.objective.band_below
    boundary, is_high = (low, False) if low is not None else (high, True)
    assert boundary is not None  # noqa: S101  CFG-314
    expected = Expected(sections.wan, lambda name: sections.origins[f"model.shape.{name}"], "CFG-316")
    weights = open_generation_weights(
        path, (), expected, training_dtype(sections), fingerprinted=False, comm=processes.comm
    )
    require_experts_in_place(weights.places if is_high else (), () if is_high else weights.places, boundary)
    return OtherExpert(weights, boundary, is_high)
