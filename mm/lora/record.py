"""Record that a training checkpoint of adapters keeps about itself, and the adapter that is in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mm.checkpoint.formats.folder import PEFT_FILE
from mm.checkpoint.formats.training import ADAPTERS_KEY, MODEL_PREFIX, weights_prefix
from mm.checkpoint.manifest import Manifest, read_manifest
from mm.checkpoint.store import read_tensor
from mm.config.run.origins import Origins
from mm.errors import CheckpointError, Problem, ResumeError, raise_all
from mm.lora.adapter import Adapter
from mm.lora.files import COMFYUI_FILE, PARTS_FILE, write_adapter, write_parts
from mm.lora.layer import Adapted, adapter_shapes
from mm.lora.low_bit import LowBit

BASE_IDENTITY = "base_identity"
"""Key of an adapter's texts: the identity of the base model that it was trained on."""
_SHOWN = 3


@dataclass(frozen=True)
class AdapterRecord:
    """The scalar `adapters` of a checkpoint.

    Attributes:
        adapted: r and alpha of every linear by native module name.
        base_path: of the base model when the run was started; it may move.
        base_identity: `mm.checkpoint.identity.identity` of the base model.
        base_dtype: of its linears where it is not the run's precision.
        parts: native names of the model's own parameters that were trained beside the adapters.
    """

    adapted: Mapping[str, Adapted]
    base_path: str
    base_identity: str
    base_dtype: LowBit | None
    parts: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Values for the manifest."""
        return {
            "adapted": {name: list(how) for name, how in self.adapted.items()},
            "base": {"path": self.base_path, "identity": self.base_identity, "dtype": self.base_dtype},
            **({"parts": list(self.parts)} if self.parts else {}),
        }

    @classmethod
    def parse(cls, values: Any, where: Path) -> AdapterRecord:
        """The inverse of `as_json`.

        Raises:
            CheckpointError: CKPT-012 for anything else.
        """
        try:
            adapted = {name: Adapted(int(rank), float(alpha)) for name, (rank, alpha) in values["adapted"].items()}
            base = values["base"]
            parts = tuple(map(str, values.get("parts", ())))
            return cls(adapted, str(base["path"]), str(base["identity"]), base["dtype"], parts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            found = f"{where}: {ADAPTERS_KEY} of its manifest is not understood ({type(error).__name__}: {error})."
            raise CheckpointError("CKPT-012", found, "Use a checkpoint of this version.") from None

    @property
    def base(self) -> str:
        """The base model, for messages."""
        kept = f", kept in {self.base_dtype}" if self.base_dtype else ""
        return f"{self.base_path} (identity {self.base_identity}{kept})"

    def texts(self) -> dict[str, str]:
        """Texts for the header of a file of another format."""
        return {"base_model": self.base_path, BASE_IDENTITY: self.base_identity}

    def require_same(self, theirs: AdapterRecord, where: Path, words: Origins) -> None:
        """Refuse to go on from the adapters of a checkpoint in another way than it was trained.

        Args:
            theirs: the checkpoint's. where: the checkpoint. words: the user's, of this run.

        Raises:
            ResumeError: CKPT-082 for another r, alpha or other linears, CKPT-083 for another base; both at once.
        """
        problems = []
        load, save = words["checkpoint.load"].name, words["checkpoint.save"].name
        fresh = words["checkpoint.weights_only"].with_value(True)

        def named(value: str) -> str:
            return words[f"adapters.{value}"].name

        differing = [
            f"{name} is {_how(theirs.adapted.get(name))} there, {_how(self.adapted.get(name))} here"
            for name in {**theirs.adapted, **self.adapted}
            if theirs.adapted.get(name) != self.adapted.get(name)
        ]
        if differing:
            more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
            problems.append(
                Problem(
                    "CKPT-082",
                    f"{where} has other adapters: {'; '.join(differing[:_SHOWN])}{more}.",
                    f"Give the {named('rank')}, {named('alpha')} and {named('targets')} that it was trained with, or "
                    "save into a new folder.",
                )
            )
        if (theirs.base_identity, theirs.base_dtype) != (self.base_identity, self.base_dtype):
            problems.append(
                Problem(
                    "CKPT-083",
                    f"{where} was trained on the base model {theirs.base}, and the base of this run is {self.base}.",
                    f"Give that {named('base')} and {named('base_dtype')}. To begin with its adapters on another base, "
                    f"give {load} with {fresh} and a new {save}.",
                )
            )
        raise_all(ResumeError, problems)


def record_of(manifest: Manifest, where: Path) -> AdapterRecord | None:
    """The record of a checkpoint; None for one of a whole model. CKPT-012 as `AdapterRecord.parse`."""
    values = manifest.scalars.get(ADAPTERS_KEY)
    return None if values is None else AdapterRecord.parse(values, where)


def adapter_of(folder: Path, *, averaged: bool = False) -> Adapter:
    """The adapter in a checkpoint folder, or its average, with the base model in its texts.

    Raises:
        CheckpointError: CKPT-012 for a damaged checkpoint, CKPT-049 for one without an average.
        ResumeError: CKPT-081 for one of a whole model.
    """
    manifest = read_manifest(folder)
    record = record_of(manifest, folder)
    if record is None:
        raise ResumeError("CKPT-081", f"{folder} is of a whole model, not of adapters.", "Use a LoRA run's.")
    return _assembled(folder, manifest, record, weights_prefix(folder, manifest, averaged=averaged))


def export(folder: Path, manifest: Manifest, record: AdapterRecord) -> None:
    """Write the adapter of a checkpoint into its folder, as PEFT's file, which diffusers finds, and in ComfyUI's names.

    Parameters of the model's own that were trained beside it are no adapter: they have a file of their own.

    The second is what everything else reads: ComfyUI, its wrappers, DiffSynth-Studio, VideoX-Fun and musubi-tuner know
    no diffusers names, and take a file in them for one without any of their linears.

    Raises:
        CheckpointError: CKPT-031 when they cannot be written.
    """
    adapter = _assembled(folder, manifest, record, MODEL_PREFIX)
    write_adapter(folder / PEFT_FILE, adapter, "peft")
    write_adapter(folder / COMFYUI_FILE, adapter, "comfyui")
    if adapter.parts:
        write_parts(folder / PARTS_FILE, adapter)


def _assembled(folder: Path, manifest: Manifest, record: AdapterRecord, prefix: str) -> Adapter:
    names = adapter_shapes(dict.fromkeys(record.adapted, (0, 0)), record.adapted)
    parameters = {name: read_tensor(folder, manifest, prefix + name) for name in names}
    adapter = Adapter.of_parameters(parameters, record.adapted, record.texts())
    return replace(adapter, parts={name: read_tensor(folder, manifest, prefix + name) for name in record.parts})


def _how(adapted: Adapted | None) -> str:
    return "not adapted" if adapted is None else f"r {adapted.rank}, alpha {adapted.alpha:g}"
