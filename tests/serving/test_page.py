"""The page in a real browser: headless Chromium, the real server, the trained tiny model.

PROTEUS_SCREENSHOTS=docs/images has the test write the pictures that the documentation shows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.serving.conftest import Server

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright isn't installed")

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_PATIENCE_MS = 180_000  # a busy machine takes its time; nothing here is about speed
_QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
]
PLAN = '{"step_cache": {"kind": "schedule", "total": 12, "steps": [0, 2, 4, 6, 8, 10], "reuse": "clean"}}'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_process: type[Server]) -> Iterator[Server]:
    from proteus_deploy.tiny.trained import PORTRAIT

    started = serve_process(tmp_path_factory.mktemp("server"), "--portrait", str(PORTRAIT))
    yield started
    started.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed on this machine")
    playwright.expect.set_options(timeout=_PATIENCE_MS)
    with playwright.sync_playwright() as runner:
        opened = runner.chromium.launch(executable_path=CHROMIUM, args=_QUIET)
        yield opened
        opened.close()


@pytest.fixture
def photo(drawn_photo: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "anna.png"
    path.write_bytes(drawn_photo)
    return path


class Visitor:
    """A tab, and what went wrong in it."""

    def __init__(self, browser: Any, url: str, **device: Any) -> None:
        self.page = browser.new_context(**device).new_page()
        self.page.set_default_timeout(_PATIENCE_MS)
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        self.page.get_by_text("proteus-id: ready").wait_for()

    def _hear(self, entry: Any) -> None:
        if entry.type == "error":
            self.wrong.append(entry.text)

    def card(self, index: int = 0) -> Any:
        return self.page.locator(".card").nth(index)

    def finished(self, index: int = 0) -> Any:
        """The card, once its video can be played."""
        card = self.card(index)
        card.locator("video").wait_for()
        playwright.expect(card.locator("video")).to_have_js_property("readyState", 4)
        return card

    def shot(self, name: str, **how: Any) -> None:
        folder = os.environ.get("PROTEUS_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.evaluate("scrollTo(0, 0)")
            self.page.screenshot(path=f"{folder}/{name}.png", **how)


def test_by_keyboard_from_photo_to_video(browser: Any, server: Server, photo: Path) -> None:
    visitor = Visitor(browser, server.url, viewport={"width": 1200, "height": 800})
    page = visitor.page
    page.get_by_label("Photo with a face").set_input_files(photo)
    page.get_by_label("What the person looks like").focus()
    page.keyboard.type("a person with short brown hair")
    for _ in range(10):  # with nothing but Tab to the prompt
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "prompt":
            break
    page.keyboard.type("a person waves")
    page.get_by_text("Size, steps, seed, plan").focus()
    page.keyboard.press("Enter")
    page.get_by_label("Steps").fill("40")
    page.get_by_label("Seed").fill("3")
    page.get_by_role("button", name="Make the video").focus()
    page.keyboard.press("Enter")
    card = visitor.card()
    card.get_by_text("Step ").wait_for()
    card.get_by_alt_text("Preview of a step").wait_for()
    assert 0 < card.locator("progress").evaluate("bar => bar.value") < 100
    visitor.shot("page-running")
    assert "seed 3" in visitor.finished().inner_text()
    assert visitor.wrong == []
    assert {url.split("/")[2] for url in visitor.asked if url.startswith("http")} == {
        server.url.split("/")[2]
    }


def test_people_plans_comparing_and_cancelling(browser: Any, server: Server, photo: Path) -> None:
    visitor = Visitor(browser, server.url, viewport={"width": 1200, "height": 1300})
    page = visitor.page
    page.get_by_label("Photo with a face").set_input_files(photo)
    page.get_by_label("What the person looks like").fill("a person with short brown hair")
    page.get_by_text("Register this photo for later videos").click()
    page.get_by_label("Name").fill("Anna")
    page.get_by_role("button", name="Register").click()
    playwright.expect(page.locator("#character option:checked")).to_have_text("Anna")
    assert page.locator("#photo-shown").is_hidden(), "a video has one person"
    page.get_by_label("What happens").fill("a person nods")
    page.get_by_text("Size, steps, seed, plan").click()
    page.get_by_label("Steps").fill("12")
    page.get_by_label("Seed").fill("5")
    page.get_by_label("Plan (JSON)").fill(PLAN)
    make = page.get_by_role("button", name="Make the video")
    make.click()
    playwright.expect(visitor.card()).to_contain_text("seed 5")  # the newest card, not an earlier test's
    assert "under a plan" in visitor.finished().inner_text()
    visitor.card().get_by_role("button", name="Make the exact one too").click()
    playwright.expect(visitor.card(1).get_by_text("under a plan")).to_be_visible()
    playwright.expect(visitor.card().get_by_text("under a plan")).to_have_count(0)
    visitor.finished()
    for index in (0, 1):
        visitor.card(index).get_by_role("button", name="Compare").click()
    page.locator("#comparison").wait_for()
    page.get_by_role("button", name="Play both").click()
    playwright.expect(page.locator("#right")).not_to_have_js_property("currentTime", 0)
    visitor.shot("page")
    page.get_by_label("Plan (JSON)").fill("")
    page.get_by_label("Steps").fill("1000")
    make.click()
    visitor.card().get_by_text("Step ").wait_for()
    visitor.card().get_by_role("button", name="Cancel").click()
    visitor.card().get_by_text("Cancelled.").wait_for()
    page.get_by_label("Steps").fill("0")
    make.click(no_wait_after=True)
    page.evaluate("document.querySelector('#num_inference_steps').removeAttribute('min')")
    make.click()
    page.get_by_role("alert").get_by_text("num_inference_steps is 0").wait_for()
    page.get_by_role("button", name="Forget").click()
    playwright.expect(page.locator("#character option")).to_have_count(1)


def test_without_a_photo(browser: Any, server: Server) -> None:
    visitor = Visitor(browser, server.url, viewport={"width": 1200, "height": 800})
    page = visitor.page
    page.get_by_label("What happens").fill("a person smiles")
    page.get_by_text("Size, steps, seed, plan").click()
    page.get_by_label("Steps").fill("12")
    page.get_by_label("Seed").fill("9")
    page.get_by_label("Plan (JSON)").fill(PLAN)
    make = page.get_by_role("button", name="Make the video")
    make.click()
    page.get_by_role("alert").get_by_text("or say what the person looks like").wait_for()
    page.get_by_label("What the person looks like").fill("a woman with long red hair in a teal studio")
    make.click()
    playwright.expect(visitor.card()).to_contain_text("seed 9")
    visitor.card().get_by_text("Drawing the portrait").wait_for()
    visitor.finished()
    portrait = visitor.card().get_by_alt_text("The portrait that was drawn")
    playwright.expect(portrait).to_have_js_property("naturalWidth", 128)
    visitor.card().get_by_role("button", name="Make the exact one too").click()
    playwright.expect(visitor.card(1).get_by_text("under a plan")).to_be_visible()
    visitor.finished()
    again = visitor.card().get_by_alt_text("The portrait that was drawn")
    playwright.expect(again).to_have_js_property("naturalWidth", 128)
    pixels = """image => {
      const canvas = Object.assign(document.createElement("canvas"), { width: 128, height: 128 });
      canvas.getContext("2d").drawImage(image, 0, 0);
      return canvas.toDataURL();
    }"""
    assert again.evaluate(pixels) == portrait.evaluate(pixels), "the same person again"
    assert visitor.wrong == []


def test_on_a_phone(browser: Any, server: Server) -> None:
    """Nothing is wider than the screen, nothing to press is smaller than a finger, the history is there."""
    visitor = Visitor(
        browser, server.url, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True
    )
    page = visitor.page
    page.locator(".card video:not([hidden])").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    heights = page.eval_on_selector_all(
        "button", "all => all.filter(b => b.offsetParent).map(b => b.getBoundingClientRect().height)"
    )
    assert min(heights) >= 40
    visitor.shot("page-phone")
