"""mkdocs hook: the decision records are in the navigation and in their list, without anybody listing them."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

RECORDS = sorted((Path(__file__).parents[1] / "adr").glob("0*.md"))
SECTION = "Decisions"
MARK = "<!-- decisions -->"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    assert config.nav is not None
    section = next(entry[SECTION] for entry in config.nav if SECTION in entry)
    section += [f"adr/{path.name}" for path in RECORDS]
    return config


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return markdown.replace(MARK, "\n".join(f"- [{_title(path)}]({path.name})" for path in RECORDS))


def _title(path: Path) -> str:
    return path.read_text().partition("\n")[0].removeprefix("# ")
