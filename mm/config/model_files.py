"""Files of released models in a local folder of models: `<folder>/<owner>/<name>/<pattern>`, as hubs lay them out."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path

from mm.errors import ConfigError

_SHARED = {
    "models_t5_umt5-xxl-enc-bf16.pth": "Wan-AI/Wan2.1-T2V-1.3B",
    "Wan2.1_VAE.pth": "Wan-AI/Wan2.1-T2V-1.3B",
    "google/umt5-xxl": "Wan-AI/Wan2.1-T2V-1.3B",
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth": "Wan-AI/Wan2.1-I2V-14B-480P",
}
"""Files that many releases hold alike, and the model that is asked for them where others lack them."""


@dataclass(frozen=True)
class ModelFiles:
    """Files of a released model.

    Attributes:
        model_id: owner and name, `Wan-AI/Wan2.1-T2V-1.3B`. pattern: of the files, such as
            `diffusion_pytorch_model*.safetensors`, or of one folder, such as `google/*`.
    """

    model_id: str
    pattern: str

    def home(self, folder: Path) -> Path:
        """The model's folder in a folder of models."""
        return folder / self.model_id

    def others(self) -> tuple[ModelFiles, ...]:
        """The same files of the model that all share them with; none for files of the model alone."""
        models = {model for file, model in _SHARED.items() if fnmatch(file, self.pattern)}
        return tuple(ModelFiles(model, self.pattern) for model in sorted(models - {self.model_id}))

    def present(self, folder: Path) -> list[Path]:
        """Files, or folders, that match, sorted; none where there is nothing."""
        found = sorted(self.home(folder).glob(self.pattern)) if self.pattern else []
        return [path for path in found if not path.name.startswith(".")]

    def find(self, folder: Path, *, shared: bool = True) -> list[Path]:
        """The files that match, or those of the model that shares them.

        Args:
            folder: of models. shared: look there too.

        Raises:
            ConfigError: CFG-400 for a model that is not there, CFG-401 for a pattern that matches nothing of it.
        """
        for files in (self, *(self.others() if shared else ())):
            if found := files.present(folder):
                return found
        raise self._missing(folder)

    def _missing(self, folder: Path) -> ConfigError:
        home = self.home(folder)
        command = f"hf download {self.model_id} --local-dir {home}"
        if not home.is_dir():
            known = ["/".join(path.parts[-2:]) for path in sorted(folder.glob("*/*")) if path.is_dir()]
            near = get_close_matches(self.model_id, known, n=1)
            found = f"The model {self.model_id} is not in {folder}: {home} does not exist."
            remedy = f"Correct it (there is {near[0]}), or download it" if near else "Download it"
            return ConfigError("CFG-400", found, f"{remedy}, for example with `{command}`.")
        held = sorted(path.name for path in home.iterdir() if not path.name.startswith("."))
        listed = ", ".join(held[:8]) + (", ..." if len(held) > 8 else "")
        found = f"Nothing in {home} matches {self.pattern} (it holds {listed or 'nothing'})."
        return ConfigError("CFG-401", found, f"Correct the pattern, or fetch the files with `{command}`.")
