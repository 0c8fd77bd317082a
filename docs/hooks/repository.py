"""mkdocs hook: links of the pages that leave docs/ work in the site, too.

A file of the repository that is linked becomes a page under repository/, as it is if it is Markdown, else as code. A
folder is its README.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pygments.lexers import find_lexer_class_for_filename

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)(?=[)#])")
FOLDER = "repository/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    waiting = [file for file in files.documentation_pages() if file.abs_src_path]
    while waiting:
        file = waiting.pop()
        for path in _linked(_origin(file.src_uri), file.content_string):
            page = _page_of(path)
            is_new = page.startswith(FOLDER) and not files.get_file_from_path(page)
            if is_new and (ROOT / path).is_file():
                made = File.generated(config, page, content=_text(path))
                files.append(made)
                waiting += [made] if path.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    if here.startswith(FOLDER) and not _origin(here).endswith(".md"):
        return markdown
    folder = posixpath.dirname(here)
    return LINK.sub(lambda link: posixpath.relpath(_page_of(_target(_origin(here), link[1])), folder or "."), markdown)


def _linked(origin: str, markdown: str) -> list[str]:
    return [_target(origin, link) for link in LINK.findall(markdown)]


def _target(origin: str, link: str) -> str:
    """The file that a link in a file of the repository means; both from the root."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    return f"{path}/README.md" if (ROOT / path).is_dir() else path


def _page_of(path: str) -> str:
    """Its place in the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return FOLDER + (path if path.endswith(".md") else f"{path}.md")


def _origin(page: str) -> str:
    """The file that a page shows."""
    if not page.startswith(FOLDER):
        return f"docs/{page}"
    path = page.removeprefix(FOLDER)
    return path if (ROOT / path).exists() else path.removesuffix(".md")


def _text(path: str) -> str:
    content = (ROOT / path).read_text()
    if path.endswith(".md"):
        return content
    lexer = find_lexer_class_for_filename(path)
    language = lexer.aliases[0] if lexer else "text"
    fence = "`" * 8
    unsearched = "---\nsearch: {exclude: true}\n---\n"
    return f"{unsearched}# {posixpath.basename(path)}\n\n`{path}`\n\n{fence}{language}\n{content}\n{fence}\n"
