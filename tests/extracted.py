"""Features, as a user gets them."""

from pathlib import Path


def extract(configs: Path) -> None:
    """Feature extraction with the files in `configs`."""
    from mm.cli import extract as extract_command

    extract_command.main(
        ["--mm-data", str(configs / "data.json"), "--mm-model", str(configs / "model_wan.json"),
         "--mm-tool", str(configs / "tools.json")]
    )  # fmt: skip
