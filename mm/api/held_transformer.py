"""A pipeline's transformer: the release's weights with LoRA, where limits of memory say, on one process or on many."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mm.api.model import config_of, model_of
from mm.checkpoint.identify import identify
from mm.checkpoint.weights import WeightSource
from mm.config.model import WanConfig
from mm.config.place import process_place
from mm.config.run.residency import Residency
from mm.device.backend import Backend
from mm.errors import MMError
from mm.generate.held import hold_on_mesh
from mm.generate.render import Processes
from mm.generate.weights import Fp8, GenerationWeights
from mm.lora.adapter import Adapter, require_fit, require_parts_fit
from mm.lora.convert import read_any
from mm.lora.targets import every_linear, linears_of
from mm.parallel.velocity import ParallelVelocity
from mm.residency.budget import Room
from mm.wan.model import WanModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holding:
    """Way in which a pipeline holds its transformers.

    Attributes:
        backend: the device. dtype: of weights and arithmetic, but for what must be fp32.
        fp8: the linears of the blocks are in 8 bits, scaled for each output channel.
        processes: those that share each transformer; None where this one has it alone.
    """

    backend: Backend
    dtype: torch.dtype
    fp8: bool = False
    processes: Processes | None = None

    def room(self, transformers: int) -> Room:
        """Memory for so many transformers, before any waits in the host's."""
        of_node = process_place().local_world_size if self.processes is None else self.processes.of_node
        return Room.now(of_node, transformers=transformers)


class HeldTransformer:
    """One transformer of a pipeline.

    Attributes:
        model: the transformer, or this process's part of it. velocity: what is asked, the model or all parts of it.
    """

    def __init__(self, source: WeightSource, how: Holding, room: Room) -> None:
        """Load the weights of a source, all of them to the device; raises as `mm.api.model.model_of`."""
        self._source, self._how, self._room = source, how, room
        self._adapters: list[tuple[Adapter, float]] = []
        self._residency = Residency()
        self.model: WanModel
        self.velocity: WanModel | ParallelVelocity
        self._build()

    @property
    def config(self) -> WanConfig:
        """Shape of the whole model."""
        return config_of(self._source)

    def release(self) -> None:
        """Let go of the weights, so that what waits in host memory is free before room is measured; `hold` follows."""
        self.__dict__.pop("model", None)
        self.__dict__.pop("velocity", None)

    def restore(self) -> None:
        """Load the weights where they were before `release`, if they are not there again."""
        if "model" not in self.__dict__:
            self._build()

    def hold(self, residency: Residency, room: Room) -> None:
        """Move the weights to where limits say, and all of them outside of the device where these cannot be kept.

        Args:
            residency: checked limits. room: memory for this transformer and those beside it.

        Raises:
            ConfigError: CFG-374 where the host has no room; the weights are then where they were.
        """
        self._rebuild(residency, self._adapters, room)

    def load_lora(self, path: str | Path, alpha: float) -> None:
        """Add a LoRA of any known format to the weights; raises as `WanVideoPipeline.load_lora`."""
        adapter = read_any(identify(path, wanted="adapters"))
        require_fit(adapter, every_linear(self._source.shapes()))
        require_parts_fit(adapter, self._source.shapes())
        adapters = [*self._adapters, (adapter, alpha)]
        if self._residency.streams or self._how.fp8 or self._how.processes is not None:
            # weights are not where they could be written, in 8 bits, or parts
            self._rebuild(self._residency, adapters, self._room)
            return
        try:
            self._add(adapter, adapters)
        except MMError:  # some linears have it, and others have not
            self._add(adapter, self._adapters)
            raise
        self._adapters = adapters

    def _rebuild(self, residency: Residency, adapters: Sequence[tuple[Adapter, float]], room: Room) -> None:
        """Load the weights anew: with the least on the device where a limit cannot be kept, and as they were where
        anything else is wrong.
        """
        before = self._residency, self._adapters, self._room
        self._residency, self._adapters, self._room = residency, list(adapters), room
        self.release()  # two would not fit
        try:
            self._build()
        except MMError as error:
            if error.id == "CFG-373":
                self._residency = Residency(staying_parameters=0)
            else:
                self._residency, self._adapters, self._room = before
            self._build()
            if error.id != "CFG-373":
                raise
            log.warning("%s All blocks are copied.", error.problems[0].message)

    def _build(self) -> None:
        how = self._how
        if how.processes is None:
            held = self.config, how.dtype, how.backend, self._residency, self._room
            self.velocity = self.model = model_of(self._weights(), *held)
            return
        parallel = hold_on_mesh(self.config, how.processes, self._weights(), how.dtype, self._residency, self._room)
        self.model = parallel.stages[0].model.eval()
        self.velocity = ParallelVelocity(parallel)

    def _add(self, adapter: Adapter, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """Give the linears of one adapter their weights with several."""
        weights = self._weights(adapters)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name.rpartition(".")[0] in adapter.updates or name in adapter.parts:
                    parameter.copy_(weights.value_of(name, tuple(parameter.shape)))

    def _weights(self, adapters: Sequence[tuple[Adapter, float]] | None = None) -> GenerationWeights:
        eight_bits = Fp8("scaled", linears_of(self._source.shapes())) if self._how.fp8 else None
        added = list(self._adapters if adapters is None else adapters)
        return GenerationWeights(self._source, added, self._how.dtype, False, eight_bits)
