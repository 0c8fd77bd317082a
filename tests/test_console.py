"""The web console in a real browser: the replicas, a step's timeline, a conversation."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from afd.forkserver import ForkServer
from afd.mesh import Mesh, MeshOptions, running_mesh
from afd.state.api_keys import ApiKeys, Limits
from afd.state.connection import connect
from tests.conftest import embedded_redis

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

NANO = Path(__file__).resolve().parents[1] / "models" / "step3-nano"
PICTURES = os.environ.get("CONSOLE_PICTURES")  # a folder for what the browser shows
WAIT_MS = 15_000


@pytest.fixture(scope="module")
def mesh(fork_server: ForkServer) -> Iterator[Mesh]:
    with running_mesh(MeshOptions(NANO, attention=2, ffn=2, settings={"lease_s": "1"}), fork_server) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def mesh_with_keys(fork_server: ForkServer) -> Iterator[tuple[Mesh, list[str]]]:
    """A mesh that wants a key, and an operator's and another one."""

    async def keys(url: str) -> list[str]:
        async with connect(url) as redis:
            return [await ApiKeys(redis).create("name", Limits(), is_operator) for is_operator in (True, False)]

    with embedded_redis() as redis:
        options = MeshOptions(NANO, ffn=0, redis=redis, settings={"require_api_key": "1"})
        with running_mesh(options, fork_server) as mesh:
            yield mesh, asyncio.run(keys(redis))


@pytest.fixture
def page() -> Iterator[Any]:
    """A page that must run without an error. Meshes come first: this has an event loop in this thread."""
    errors: list[str] = []
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 950})
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if "Security Policy" in message.text else None)
        yield page
        browser.close()
    assert errors == []


LAID_OUT = """() => {
  const words = [...document.querySelectorAll("body *:not(title)")].filter((each) =>
    each.getClientRects().length && [...each.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
  const scale = (each) => each.getScreenCTM ? each.getScreenCTM().a : 1;
  const timeline = document.getElementById("timeline");
  return {
    width: Math.max(document.documentElement.scrollWidth, ...words.map((each) => each.getBoundingClientRect().right)),
    letters: Math.min(...words.map((each) => parseFloat(getComputedStyle(each).fontSize) * scale(each))),
    timeline: timeline.clientWidth / timeline.naturalWidth,
  };
}"""  # in pixels, but for the timeline: how much smaller it is than it was drawn


def picture(page: Any, name: str) -> None:
    if PICTURES:
        page.screenshot(path=Path(PICTURES) / name, full_page=True)


def ask(page: Any) -> None:
    page.fill("#question", "What is 12 + 68?")
    page.press("#question", "Enter")
    playwright.expect(page.locator("#messages .assistant")).to_have_text("80")


def show_a_step(page: Any) -> None:
    for replica in ("attention-0", "attention-1"):  # one of the two has decoded
        page.locator("#mesh .attention", has_text=replica).click()
        page.wait_for_timeout(500)
        if page.locator("#timeline").is_visible():
            break


def test_the_console_shows_the_mesh_answers_and_draws_the_step(mesh: Mesh, page: Any) -> None:
    page.goto(f"{mesh.http_url}/console")
    expect = playwright.expect
    expect(page.locator("#mesh g")).to_have_count(5)
    assert page.locator("#mesh .ffn text").first.text_content() == "0/2  ffn-0"
    expect(page.locator("#no-step")).to_have_text("Nothing has been decoded yet: ask something.")
    ask(page)
    expect(page.locator("#messages .measured")).to_contain_text("first after")
    show_a_step(page)
    assert page.locator("#timeline").evaluate("image => image.naturalWidth") > 0
    picture(page, "console.png")


def test_the_console_can_be_read_on_every_screen(mesh: Mesh, page: Any) -> None:
    page.goto(f"{mesh.http_url}/console")
    ask(page)
    show_a_step(page)
    for width in (1440, 768, 360):
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_timeout(1000)  # the timeline is drawn anew
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            picture(page, f"console-{width}-{scheme}.png")
        found = page.evaluate(LAID_OUT)
        assert found["width"] <= width
        assert found["letters"] >= 11
        assert found["timeline"] == 1


def test_a_gateway_that_is_gone_is_a_sentence(mesh: Mesh, page: Any) -> None:
    page.goto(f"{mesh.http_url}/console")
    playwright.expect(page.locator("#mesh g")).to_have_count(5)
    page.route("**/console/mesh", lambda route: route.abort())
    playwright.expect(page.locator("#problem")).to_have_text("the gateway does not answer")
    page.unroute("**/console/mesh")
    playwright.expect(page.locator("#problem")).to_be_hidden()


def test_the_console_asks_for_an_operators_key(mesh_with_keys: tuple[Mesh, list[str]], page: Any) -> None:
    mesh, (key, _) = mesh_with_keys
    page.goto(f"{mesh.http_url}/console")
    playwright.expect(page.locator("#problem")).to_contain_text("the API key is missing")
    page.fill("#key-value", key)
    page.press("#key-value", "Enter")
    playwright.expect(page.locator("#mesh g")).to_have_count(2)
    playwright.expect(page.locator("#key")).to_be_hidden()


def test_with_another_key_one_may_chat(mesh_with_keys: tuple[Mesh, list[str]], page: Any) -> None:
    mesh, (_, key) = mesh_with_keys
    page.goto(f"{mesh.http_url}/console")
    page.fill("#key-value", key)
    page.press("#key-value", "Enter")
    playwright.expect(page.locator("#problem")).to_contain_text("this API key is not an operator's")
    ask(page)
