"""The page in a real browser, with real mouse and key events."""

import base64
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm import TINY
from playground.model import Choices, load
from tests.browser import Browser
from tests.conftest import EVIL
from tests.playing import Page, circle, drawing, wait_until
from toy.circles import Circle, measure
from training.records import read_metrics

ROOT = Path(__file__).parent.parent
DONE = "!document.getElementById('status').textContent.startsWith('asking') && document.getElementById('cancel').hidden"


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module")
def served(evil_run) -> Iterator[Page]:
    """The page of an untrained run of 32x32 pixels, whose prompts try to be scripts."""
    page = Page(load(Choices(str(evil_run))))
    yield page
    page.close()


@pytest.fixture
def tab(browser, served) -> Iterator[Browser]:
    """The page, freshly opened. Afterwards nothing may have gone wrong in it, or been asked of another place."""
    browser.messages.clear()
    browser.resize(1280, 900)
    browser.open(served.server.url)
    browser.wait("document.title.endsWith('minControlNet') && document.querySelector('#tabs button')")
    yield browser
    refused = [m for m in browser.problems() if "the server responded with a status of 400" not in m]
    assert not refused and all(url.startswith(served.server.url) for url in browser.requests())
    assert not browser.run("document.title").startswith("evil")


def picture(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))


def canvas(tab: Browser) -> np.ndarray:
    """The hint on the page, (H,W,3) uint8."""
    return picture(tab.run("document.getElementById('canvas').toDataURL()"))


def pictures(tab: Browser) -> list[np.ndarray]:
    sources = "[...document.querySelectorAll('#shown .frame img:first-child')].map((image) => image.src)"
    return [picture(uri) for uri in tab.run(sources)]


def choose(tab: Browser, name: str, value: object) -> None:
    """Set a field as a person does who leaves it afterwards."""
    tab.run(f"""(() => {{
        const field = document.getElementById({name!r});
        field.value = {json.dumps(value)};
        for (const kind of ["input", "change"]) field.dispatchEvent(new Event(kind));
    }})()""")


def draw_circle(tab: Browser, x: float, y: float, radius: float) -> None:
    """Draw a circle with the ellipse tool and the mouse; lengths are fractions of the canvas."""
    tab.click("[data-tool=ellipse]")
    left, top, width, height = tab.box("#canvas")
    corner = lambda d: (left + (x + d) * width, top + (y + d) * height)
    tab.drag(*(corner(d) for d in np.linspace(-radius, radius, 7)))


def draw(tab: Browser, button: str = "#draw") -> None:
    tab.click(button)
    tab.wait(DONE)


# ------------------------------------------------------------------------------------------------------------- drawing
def test_a_circle_is_drawn_and_its_picture_comes_back(tab, served):
    draw_circle(tab, 0.45, 0.5, 0.25)
    hint = canvas(tab)
    ring, disc = hint[..., 0] > 60, Circle(0.45, 0.5, 0.25, "gold", "navy").disc(32)
    inside = np.maximum.accumulate(ring, 1) & np.maximum.accumulate(ring[:, ::-1], 1)[:, ::-1]
    assert (inside & disc).sum() / (inside | disc).sum() > 0.8
    tab.click("#prompt")
    tab.type("gold circle with navy background")
    tab.run("""window.seen = []; new MutationObserver(() => {
        const image = document.querySelector(".forming img");
        const [status, progress] = ["status", "progress"].map((id) => document.getElementById(id));
        seen.push([image?.src, status.textContent, progress.value]);
    }).observe(document.getElementById("picture"), { subtree: true, childList: true, characterData: true })""")
    draw(tab)
    seen = tab.run("seen")
    assert any(uri and picture(uri).shape == (32, 32, 3) for uri, _, _ in seen)
    assert any("of 20, " in text and "s left" in text for _, text, _ in seen)
    assert max(progress for _, _, progress in seen) == 1
    assert tab.run("document.getElementById('status').textContent") == "done"
    (drawn,) = pictures(tab)
    fields = drawing(
        prompt="gold circle with navy background", size="32x32", steps=20, scale=TINY.guidance,
        controls=[{"hint": tab.run("document.getElementById('canvas').toDataURL()").split(",")[1]}],
    )  # fmt: skip
    (same,) = [event for event in served.post(fields)[1] if event["event"] == "picture"]
    assert np.array_equal(drawn, picture(same["image"]))
    command = tab.run("document.getElementById('command').textContent")
    assert command == same["command"] and "--prompt 'gold circle with navy background'" in command
    overlaid = "getComputedStyle(document.querySelector('#shown .over')).opacity"
    assert tab.run(overlaid) == "0"
    tab.run("document.getElementById('overlay').focus()")
    tab.key("ArrowRight")
    assert tab.run(overlaid) == "0.01"


def test_undo_redo_clear_and_the_other_tools(tab):
    states = [canvas(tab)]
    left, top, width, height = tab.box("#canvas")
    at = lambda x, y: (left + x * width, top + y * height)
    for tool, keys in (("pen", "p"), ("line", "l"), ("rectangle", "r"), ("eraser", "e")):
        tab.key(keys)
        assert tab.run(f"document.querySelector('[data-tool={tool}]').ariaPressed") == "true"
        tab.drag(at(0.2, 0.3), at(0.5, 0.8), at(0.9, 0.7))
        states.append(canvas(tab))
    assert all(not np.array_equal(a, b) for a, b in zip(states, states[1:], strict=False))
    assert states[1][:, :16].any() and (states[4] > 0).sum() < (states[3] > 0).sum()  # the eraser takes away
    for before in states[3::-1]:
        tab.key("z", modifiers=2)
        assert np.array_equal(canvas(tab), before)
    assert tab.run("document.getElementById('undo').disabled")
    for after in states[1:]:
        tab.key("z", modifiers=2 | 8)
        assert np.array_equal(canvas(tab), after)
    choose(tab, "colors", "white")
    assert np.array_equal(canvas(tab), 255 - states[4])
    tab.click("#clear")
    assert canvas(tab).min() == 255
    tab.click("#undo")
    assert np.array_equal(canvas(tab), 255 - states[4])
    tab.click("#undo")  # of the colours, with which pen and eraser go
    assert np.array_equal(canvas(tab), states[4]) and tab.run("document.getElementById('colors').value") == "black"
    tab.key("p")
    left, top, width, height = tab.box("#canvas")
    tab.drag(at(0.1, 0.05), at(0.5, 0.05), at(0.9, 0.05))
    assert (canvas(tab)[..., 0] > 0).sum() > (states[4][..., 0] > 0).sum()


def test_drawing_with_the_keyboard_alone(tab):
    tab.run("document.querySelector('[data-tool=line]').focus()")
    tab.key("Enter", text="\r")
    tab.run("document.getElementById('canvas').focus()")
    tab.key(" ")
    for _ in range(3):
        tab.key("ArrowRight", modifiers=8)
    tab.key(" ")
    drawn = canvas(tab)[..., 0] > 0
    assert drawn[15:17, 17:27].all() and not drawn[:14].any() and not drawn[18:].any()
    tab.key("Enter", modifiers=2)  # Control+Enter draws
    tab.wait("document.querySelector('#shown button')")
    tab.wait(DONE)


# --------------------------------------------------------------------------------------------------------------- hints
def test_images_are_opened_dropped_and_chosen(tab, served, tmp_path):
    ring = np.asarray(Image.open(io.BytesIO(circle(32))))
    (tmp_path / "ring.png").write_bytes(circle(32))
    (tmp_path / "bad.png").write_bytes(b"no image")
    root = tab.send("DOM.getDocument")["root"]["nodeId"]
    field = tab.send("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    tab.send("DOM.setFileInputFiles", files=[str(tmp_path / "ring.png")], nodeId=field)
    tab.wait("!document.getElementById('undo').disabled")
    assert np.array_equal(canvas(tab), ring)
    tab.send("DOM.setFileInputFiles", files=[str(tmp_path / "bad.png")], nodeId=field)
    tab.wait("!document.getElementById('error').hidden")
    assert "cannot be used" in tab.run("document.getElementById('error').textContent")
    assert np.array_equal(canvas(tab), ring)
    Image.new("RGB", (64, 32), "white").save(tmp_path / "wide.png")
    tab.send("DOM.setFileInputFiles", files=[str(tmp_path / "wide.png")], nodeId=field)
    tab.wait("document.getElementById('hint-note').textContent.startsWith('50% of the image was cut off')")
    choose(tab, "kind", "sobel")
    Image.linear_gradient("L").resize((32, 32)).save(tmp_path / "photo.png")
    tab.send("DOM.setFileInputFiles", files=[str(tmp_path / "photo.png")], nodeId=field)
    wait_until(lambda: 0 < canvas(tab).mean() < 100)
    soft = canvas(tab)
    tab.run("""(() => { const gain = document.querySelector("#parameters input");
        gain.value = 12; gain.dispatchEvent(new Event("input")); })()""")
    wait_until(lambda: canvas(tab).mean() > 2 * soft.mean())
    tab.click("#undo")
    assert canvas(tab).min() == 255  # a live preview is one step
    choose(tab, "kind", "")
    tab.click("#clear")
    tab.run(f"""(() => {{
        const bytes = Uint8Array.from(atob("{base64.b64encode(circle(32)).decode()}"), (c) => c.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "x.png", {{ type: "image/png" }}));
        const drop = new DragEvent("drop", {{ dataTransfer: transfer, cancelable: true }});
        document.getElementById("board").dispatchEvent(drop);
    }})()""")
    wait_until(lambda: np.array_equal(canvas(tab), ring))
    tab.click("#choose")
    tab.wait(
        "document.querySelectorAll('#choices img').length === 2 && document.querySelector('#choices img').complete"
    )
    tab.click("#choices button")
    tab.wait("document.getElementById('prompt').value")
    assert tab.run("document.getElementById('prompt').value") == EVIL
    assert np.array_equal(canvas(tab), served.routes.loaded.hints.read(22))
    draw(tab)
    assert len(pictures(tab)) == 1 and tab.run("document.querySelectorAll('#past li').length") == 1
    assert not tab.run("document.querySelector('img[src=x]')")


def test_compare_history_and_several_hints(tab):
    choose(tab, "steps", 2)
    draw_circle(tab, 0.5, 0.5, 0.3)
    draw(tab)
    (single,) = pictures(tab)
    draw(tab, "#compare")
    names = "[...document.querySelectorAll('#shown .name')].map((name) => name.textContent)"
    assert tab.run(names) == ["without control", "strength 0.5", "strength 1", "strength 1.5"]
    compared = pictures(tab)
    assert len(compared) == 4 and np.array_equal(compared[2], single) and not np.array_equal(compared[0], single)
    tab.click("#shown button:nth-child(2)")
    assert "--strength 0.5" in tab.run("document.getElementById('command').textContent")
    tab.click("#add")
    draw_circle(tab, 0.3, 0.3, 0.2)
    choose(tab, "strength", 0.6)
    choose(tab, "seed", 5)
    draw(tab)
    command = tab.run("document.getElementById('command').textContent")
    assert "--hint hint.png --strength 1.0" in command and "--hint hint-2.png --strength 0.6" in command
    assert tab.run("document.querySelectorAll('#past li').length") == 3
    tab.click("#past li:last-child button")
    assert np.array_equal(pictures(tab)[0], single)
    tab.click("#reuse")
    tab.wait("document.querySelectorAll('#tabs button').length === 1")
    assert tab.run("document.getElementById('seed').value") == "0"
    draw(tab)
    assert np.array_equal(pictures(tab)[0], single)


def test_a_size_that_was_typed_counts_when_a_key_draws(tab):
    """The field has not been left, so that no `change` came."""
    choose(tab, "steps", 1)
    draw_circle(tab, 0.5, 0.5, 0.3)
    tab.run("document.getElementById('size').focus(); document.getElementById('size').value = '64'")
    tab.key("Enter", modifiers=2)
    tab.wait("document.getElementById('status').textContent === 'done'")
    assert pictures(tab)[0].shape == canvas(tab).shape == (64, 64, 3)
    assert "--resolution 64x64" in tab.run("document.getElementById('command').textContent")
    tab.click("#reuse")
    tab.wait("document.querySelectorAll('#tabs button').length === 1")
    tab.click("#add")
    assert canvas(tab).shape == (64, 64, 3)
    tab.run("document.getElementById('size').value = 'large'")
    tab.key("Enter", modifiers=2)
    tab.wait("document.getElementById('error').textContent.includes('The size should be')")


def test_cancel_errors_and_a_tab_that_is_closed(tab, served):
    choose(tab, "steps", 999)
    choose(tab, "num", 16)
    tab.click("#draw")
    tab.wait("document.getElementById('status').textContent.includes('step')")
    tab.key("Escape")
    tab.wait("document.getElementById('status').textContent === 'cancelled'")
    wait_until(lambda: len(served.routes.line) == 0)
    choose(tab, "steps", 2000)
    draw(tab)
    assert "whole number from 1 to 999" in tab.run("document.getElementById('error').textContent")
    choose(tab, "size", "large")
    assert "The size should be" in tab.run("document.getElementById('error').textContent")
    choose(tab, "size", "60x90")
    assert tab.run("document.getElementById('size').value") == "64x96" and canvas(tab).shape == (96, 64, 3)
    choose(tab, "steps", 999)
    tab.click("#draw")
    tab.wait("document.getElementById('status').textContent.includes('step')")
    assert len(served.routes.line) == 1
    tab.open(served.server.url + "?again")  # leaves the page
    wait_until(lambda: len(served.routes.line) == 0)


# --------------------------------------------------------------------------------------------------------------- looks
def test_the_page_fits_and_everything_has_a_name(tab):
    choose(tab, "steps", 1)
    draw(tab, "#compare")
    for width in (360, 390, 700, 1280):
        tab.resize(width, 900, mobile=width < 500)
        assert tab.run("document.documentElement.scrollWidth") <= width
    tab.send("Accessibility.enable")
    nodes = tab.send("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "textbox", "slider", "checkbox", "combobox", "spinbutton", "tab", "image", "progressbar")
    controls = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
    assert len(controls) > 25
    assert not [node for node in controls if not node.get("name", {}).get("value", "").strip()]


# ------------------------------------------------------------------------------------------------------ a trained model
@pytest.fixture(scope="module")
def trained() -> Iterator[Page]:
    """The page of the demo's run. Skips where there is none that obeys its hints."""
    run = Path(os.environ.get("DEMO_RUN", ROOT / "runs/demo"))
    gains = [entry["control_gain"] for entry in read_metrics(run) if "control_gain" in entry]
    if not gains or gains[-1] < 0.8:
        pytest.skip("no trained demo (make train, or DEMO_RUN=its folder)")
    page = Page(load(Choices(str(run))))
    yield page
    page.close()


def test_the_controlnet_obeys_a_circle_drawn_with_the_mouse(trained, browser):
    browser.resize(1280, 900)
    browser.open(trained.server.url)
    browser.wait("document.querySelector('#tabs button')")
    wanted = Circle(0.4, 0.55, 0.22, "gold", "navy")
    draw_circle(browser, wanted.x, wanted.y, wanted.radius)
    browser.click("#prompt")
    browser.type(wanted.prompt)
    draw(browser)
    verdict = measure(pictures(browser)[0], wanted)
    assert verdict.iou >= 0.8 and verdict.color_right and verdict.background_right, verdict
