"""The documentation: its links lead somewhere, on GitHub and in the site, which is built without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor
from markdown_it import MarkdownIt
from markdown_it.token import Token

from afd.client import Options
from afd.v1 import gateway_pb2, sampling_pb2

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").glob("*.md"),
        *(ROOT / "k8s").rglob("README.md"),
        *(ROOT / "models").rglob("README.md"),
    ]
)
EXTERNAL = re.compile(r"[a-z]+:")


@cache
def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def links(page: Path) -> Iterator[str]:
    for token in tokens(page):
        for child in token.children or []:
            target = child.attrGet("href" if child.type == "link_open" else "src")
            if target and not EXTERNAL.match(str(target)):
                yield str(target)


@cache
def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them, and as mkdocs.yml has them made."""
    names: list[str] = []
    for heading, inline in zip(tokens(page), tokens(page)[1:], strict=False):
        if heading.type == "heading_open":
            text = "".join(child.content for child in inline.children or [])
            names.append(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
    again = Counter(names)
    assert max(again.values(), default=1) == 1, f"{page.name} has two headings that are the same"
    return set(names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"there is no {path}"
        assert target.is_relative_to(ROOT), f"{path} is not in the repository"
        if anchor:
            assert anchor in anchors(target), f"{target.name} has no heading #{anchor}: {sorted(anchors(target))}"


def test_links_are_found_where_they_are() -> None:
    assert "docs/reliability.md#what-can-be-changed-while-it-serves" in list(links(ROOT / "README.md"))
    assert "images/architecture.svg" in list(links(ROOT / "docs" / "concepts.md"))
    assert "../afd/config.py" in list(links(ROOT / "docs" / "deploy.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make docs` builds it: a warning is an error."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_site_has_every_page_and_every_decision_in_its_navigation(site: Path) -> None:
    home = (site / "adr" / "index.html").read_text()
    for record in (ROOT / "docs" / "adr").glob("0*.md"):
        assert f'href="{record.stem}.html"' in home
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").is_file()


def test_site_fetches_nothing_from_others(site: Path) -> None:
    for page in site.rglob("*.html"):
        fetched = re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text())
        assert fetched == [], page.name


def test_reference_has_the_whole_protocol_and_the_whole_sdk(site: Path) -> None:
    protocol = (site / "reference" / "protocol.html").read_text()
    for file in (gateway_pb2.DESCRIPTOR, sampling_pb2.DESCRIPTOR):
        for message in file.message_types_by_name.values():
            assert isinstance(message, Descriptor)
            assert f'id="{message.name.lower()}"' in protocol
            assert all(f"<code>{field.name}</code>" in protocol for field in message.fields), message.name
    assert "Equal fingerprints mean equal weights." in protocol, "comments are there, too"
    sdk = (site / "reference" / "sdk.html").read_text()
    for name in ("Client.generate", "SyncClient.resume", "Stream.aclose", "Token.logprob", "SamplingOptions.top_p"):
        assert f'id="afd.client.{name}"' in sdk


def test_reference_says_what_each_option_means(site: Path) -> None:
    sdk = (site / "reference" / "sdk.html").read_text()
    said = re.findall(
        r'id="afd\.client\.\w*Options\.(\w+)"(?:(?!<h[23]).)*?<div class="doc doc-contents[^>]*>\s*<p>', sdk, re.S
    )
    assert set(said) == set(Options.__annotations__)
