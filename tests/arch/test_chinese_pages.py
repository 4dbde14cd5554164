"""The Chinese pages say what the English ones say: commands, code, figures, links and rows, section by section."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [("README.md", "README_zh.md"), ("docs/quickstart.md", "docs/zh/quickstart.md")]
TRANSLATED = {zh: en for en, zh in PAGES}
LINK = re.compile(r"\]\(([^)]+)\)")


def body(page: str) -> str:
    """A page without the line that leads to the other language, which must be its first."""
    first, rest = (ROOT / page).read_text().split("\n", 1)
    (other,) = LINK.findall(first)
    assert {page, str((ROOT / page).parent.joinpath(other).resolve().relative_to(ROOT))} in map(set, PAGES)
    return rest


def sections(text: str) -> list[tuple[int, str]]:
    """Level of the heading and text of each section."""
    outside = re.sub(r"^```.*?^```", lambda block: block[0].replace("\n#", "\n "), text, flags=re.MULTILINE | re.DOTALL)
    starts = [match.start() for match in re.finditer(r"^#+ ", outside, re.MULTILINE)]
    parts = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
    return [(len(part) - len(part.lstrip("#")), part) for part in parts]


def code_blocks(text: str) -> list[str]:
    """Code without its comments, which may be in another language."""
    blocks = re.findall(r"^```\w*\n.*?^```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(r"\s+# .*", "", block) for block in blocks]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def code_words(text: str) -> Counter[str]:
    return Counter(re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", prose(text)))


def figures(text: str) -> Counter[str]:
    """Numbers outside code and links."""
    return Counter(re.findall(r"\d[\d.]*\d|\d", LINK.sub("", re.sub(r"`[^`]+`", "", prose(text)))))


def links(text: str, page: str) -> list[str]:
    """What a text links to, below the root; a page that has a translation counts as the English one."""
    found = []
    for target in LINK.findall(text):
        path = (ROOT / page).parent.joinpath(target.partition("#")[0]).resolve()
        assert path.exists(), f"{page} links to {target}"
        found.append(TRANSLATED.get(str(path.relative_to(ROOT)), str(path.relative_to(ROOT))))
    return found


def rows(text: str, page: str) -> list[tuple[Counter[str], list[str]]]:
    """Code and links of each row of the tables."""
    lines = [line for line in prose(text).splitlines() if line.startswith("|")]
    return [(code_words(line), links(line, page)) for line in lines]


def first_columns(text: str) -> list[list[str]]:
    """Names and numbers in the first cell of each row, which are the same in both languages."""
    cells = [line.split("|")[1] for line in prose(text).splitlines() if line.startswith("|")]
    names = [re.findall(r"[A-Z][A-Za-z]*[A-Z][A-Za-z0-9]*(?:-[A-Z]+)*|\d+", cell) for cell in cells]
    return [[name.removesuffix("s") for name in found] for found in names]


@pytest.mark.parametrize(("english", "chinese"), PAGES)
def test_pages_are_in_step(english: str, chinese: str) -> None:
    ours, theirs = sections(body(english)), sections(body(chinese))
    assert [level for level, _ in ours] == [level for level, _ in theirs], "headings"
    for (_, here), (_, there) in zip(ours, theirs, strict=True):
        title = there.splitlines()[0]
        assert code_blocks(here) == code_blocks(there), f"code of {title}"
        assert code_words(here) == code_words(there), f"`words` of {title}"
        assert figures(here) == figures(there), f"figures of {title}"
        assert sorted(links(here, english)) == sorted(links(there, chinese)), f"links of {title}"
        assert rows(here, english) == rows(there, chinese), f"rows of {title}"
        assert first_columns(here) == first_columns(there), f"first columns of {title}"


@pytest.mark.parametrize("page", TRANSLATED)
def test_the_chinese_pages_are_chinese(page: str) -> None:
    """Every paragraph and every row of words has Chinese characters."""
    for block in re.split(r"\n\n+", prose(body(page))):
        words = re.findall(r"[a-z]{3,}", LINK.sub("", re.sub(r"`[^`]+`", "", block)))
        if len(words) > 3:
            assert re.search(r"[\u4e00-\u9fff]", block), block
