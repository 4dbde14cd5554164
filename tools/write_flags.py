"""Writes docs/flags.md from the classes that read the flags: .venv/bin/python tools/write_flags.py"""

from pathlib import Path

from mm.cli import flags_page

PAGE = Path(__file__).resolve().parents[1] / "docs" / "flags.md"

if __name__ == "__main__":
    PAGE.write_text(flags_page.flags_page())
