"""Open every page of the built book in headless Chromium, from disk, and report what a reader would stumble over.

    python book/check_html.py [--shots FOLDER] [--pages TEXT] [--without-chromium]

Run after ``make book``; CI does. It checks, in light and in dark: no error on the console, no request for anything off
the page, every image there and with an alt text of its own, every formula rendered, every slider moving its picture by
mouse and by keyboard, readable text. Without a browser: internal links and anchors, and that every exercise's stub
fails its check and its solution passes. ``--shots`` saves a picture of each page for looking at.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build/html"
EXECUTED = ROOT / "_build/jupyter_execute"
MOST_SECONDS = 180  # of processor time per chapter
TALLEST = 8000  # px of a picture; Chromium leaves what is beyond 16384 white

# What is asked of a loaded page; the answer is a list of complaints.
LOOK = r"""
(async () => {
  const found = [];
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  await Promise.all(Array.from(document.images, (image) => image.decode().catch(() => 0)));
  const name = (image) => image.getAttribute("src").slice(0, 60);
  for (const image of document.images) {
    if (!image.naturalWidth) found.push("image does not show: " + name(image));
    const alt = image.getAttribute("alt");
    if (!alt || /\.(png|jpe?g|svg|webp|gif)$/i.test(alt)) found.push("image without alt text: " + name(image));
  }
  for (const formula of document.querySelectorAll(".math")) {
    if (!formula.querySelector("mjx-container")) found.push("raw formula: " + formula.textContent.slice(0, 60));
    if (formula.querySelector("mjx-merror, [data-mjx-error]")) found.push("faulty formula: " + formula.textContent);
  }
  for (const cell of document.querySelectorAll(".widget-subarea, script[type*='jupyter.widget']")) {
    found.push("a widget that needs a kernel: " + cell.outerHTML.slice(0, 60));
  }
  const shown = (figure) => Array.from(figure.querySelectorAll("img")).findIndex((image) => !image.hidden);
  for (const knob of document.querySelectorAll("input[type=range]")) {
    const figure = knob.closest("figure.frames");
    if (!figure) { found.push("a slider of nothing"); continue; }
    if (!knob.getAttribute("aria-label")) found.push("a slider without a label");
    const before = shown(figure), value = knob.value;
    knob.value = Number(knob.value) === Number(knob.max) ? knob.min : knob.max;
    knob.dispatchEvent(new Event("input"));
    if (shown(figure) === before) found.push("a slider that moves nothing in " + figure.id);
    if (figure.querySelectorAll("img:not([hidden])").length !== 1) found.push("not one frame in " + figure.id);
    knob.value = value;
    knob.dispatchEvent(new Event("input"));
  }
  const rgba = (colour) => {
    const parts = colour.match(/[\d.]+/g).map(Number);
    const scale = colour.startsWith("color(") ? 255 : 1;
    return [...parts.slice(0, 3).map((c) => c * scale), parts.length > 3 ? parts[3] : 1];
  };
  const light = (colour) => {
    const linear = colour.map((c) => (c / 255 <= 0.04045 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const ground = (element) => {
    if (!element) return [255, 255, 255];
    const [r, g, b, alpha] = rgba(getComputedStyle(element).backgroundColor);
    if (alpha === 1) return [r, g, b];
    return ground(element.parentElement).map((below, i) => alpha * [r, g, b][i] + (1 - alpha) * below);
  };
  const texts = "article p, article li, article td, article pre, figcaption, .frames-knobs label";
  for (const text of document.querySelectorAll(texts)) {
    const [a, b] = [light(rgba(getComputedStyle(text).color).slice(0, 3)), light(ground(text))].sort((x, y) => x - y);
    if ((b + 0.05) / (a + 0.05) < 4.5) found.push("hard to read: " + text.textContent.trim().slice(0, 60));
  }
  return found;
})()
"""

KNOB = """
(() => {
  const knob = document.querySelector("figure.frames input");
  if (!knob) return null;
  knob.focus();
  return [Number(knob.value), Number(knob.max)];
})()
"""


class Browser:
    """One headless Chromium, spoken to through its debugging protocol."""

    def __init__(self, program: str) -> None:
        import websocket  # comes with Jupyter

        self.folder = tempfile.TemporaryDirectory()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"]
        options += ["--remote-allow-origins=*", f"--user-data-dir={self.folder.name}", "--window-size=1280,900"]
        self.process = subprocess.Popen([program, *options, "about:blank"], stderr=subprocess.DEVNULL)
        port = self._port(Path(self.folder.name) / "DevToolsActivePort")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            page = next(target for target in json.load(answer) if target["type"] == "page")
        self.socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=180, suppress_origin=True)
        self.count, self.events = 0, []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Page.setLifecycleEventsEnabled", enabled=True)

    def _port(self, file: Path) -> str:
        for _ in range(300):
            if file.exists() and file.read_text().strip():
                return file.read_text().split()[0]
            time.sleep(0.1)
        raise RuntimeError("Chromium did not start within 30 s")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; events that arrive meanwhile are kept."""
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.count:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self.events.append(message)

    def open(self, address: str) -> None:
        """Load a page; the events of loading are then in ``events``."""
        self.events.clear()
        loader = self.ask("Page.navigate", url=address)["loaderId"]
        done = {"name": "load", "loaderId": loader}
        while not any(done.items() <= event.get("params", {}).items() for event in self.events):
            self.events.append(json.loads(self.socket.recv()))

    def value(self, script: str) -> Any:
        """What a script evaluates to on the page."""
        answer = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"])[:500])
        return answer["result"].get("value")

    def close(self) -> None:
        """End the browser."""
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)
        self.folder.cleanup()


def complaints(browser: Browser, page: Path, scheme: str, shots: Path | None) -> list[str]:
    """What is wrong with one page in one colour scheme."""
    media = [{"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": "reduce"}]
    browser.ask("Emulation.setEmulatedMedia", features=media)
    browser.open(page.as_uri())
    found = browser.value(LOOK)
    theme = browser.value("document.documentElement.dataset.theme")
    if theme != scheme:
        found.append(f"the page is {theme}")
    knob = browser.value(KNOB)
    if knob is not None:
        key = "ArrowLeft" if knob[0] == knob[1] else "ArrowRight"
        code = 37 if key == "ArrowLeft" else 39
        for kind in ("keyDown", "keyUp"):
            browser.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)
        if browser.value(KNOB)[0] == knob[0]:
            found.append("the first slider does not hear the keyboard")
    for event in browser.events:
        found += _heard(event["method"], event.get("params", {}))
    if shots is not None:
        browser.value("document.activeElement.blur(); window.scrollTo(0, 0)")
        height = browser.value("document.documentElement.scrollHeight")
        for part, top in enumerate(range(0, height, TALLEST), start=1):
            clip = {"x": 0, "y": top, "width": 1280, "height": min(height - top, TALLEST), "scale": 1}
            data = browser.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
            (shots / f"{page.stem}-{scheme}-{part}.png").write_bytes(base64.b64decode(data))
    return found


def _heard(method: str, event: dict[str, Any]) -> list[str]:
    """A complaint about one event of the debugging protocol, if it deserves one."""
    if method == "Runtime.exceptionThrown":
        return [f"script error: {event['exceptionDetails'].get('exception', {}).get('description', '')[:200]}"]
    if method == "Runtime.consoleAPICalled" and event["type"] in ("error", "assert"):
        return [f"console: {[argument.get('value') for argument in event['args']]}"]
    if method == "Log.entryAdded" and event["entry"]["level"] == "error":
        return [f"console: {event['entry']['text'][:200]} {event['entry'].get('url', '')[:100]}"]
    if method == "Network.requestWillBeSent":
        address = event["request"]["url"]
        if urlsplit(address).scheme not in ("file", "data", "blob", "about"):
            return [f"asks for {address[:120]}"]
    return []


class _Page(HTMLParser):
    """The links and the anchors of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            if name in ("href", "src") and value and tag != "use":
                self.links.append(value)


def dead_links(pages: list[Path]) -> list[str]:
    """Links within the book that lead nowhere."""
    parsed = {page: _Page(page.read_text(encoding="utf-8")) for page in HTML.rglob("*.html")}
    found = []
    for page in pages:
        for link in parsed[page].links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith("data:"):
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if not target.exists():
                found.append(f"{page.relative_to(HTML)}: no {link}")
            elif parts.fragment and target in parsed and unquote(parts.fragment) not in parsed[target].anchors:
                found.append(f"{page.relative_to(HTML)}: no anchor {link}")
    return found


def _verdict(shown: str) -> str:
    """The last line of a cell's text that a check wrote, if there is one."""
    return next((line for line in reversed(shown.splitlines()) if line.startswith(("✓", "✗"))), "no verdict")


def chapter_faults(page: Path) -> list[str]:
    """What the cells of one chapter's page show: errors, stubs that pass, solutions that do not, a chapter too slow."""
    found, name = [], page.stem
    heads = list(re.finditer(r'<div class="cell ([^"]*)docutils container"', text := page.read_text(encoding="utf-8")))
    for head, after in zip(heads, [*heads[1:], None]):
        tags, shown = head[1], re.sub("<[^>]*>", "", text[head.end() : after.start() if after else None])
        if "tag_stub" in tags and ("✗ Not yet." not in shown or "✓" in shown):
            found.append(f"{name}: an unsolved exercise is not refused: {_verdict(shown)}")
        if "tag_solution" in tags and ("✓ Solved." not in shown or "✗" in shown):
            found.append(f"{name}: a solution does not pass: {_verdict(shown)}")
    if re.search(r'class="output (stderr|traceback)', text):
        found.append(f"{name}: a cell shows an error or a warning")
    glued = json.loads((EXECUTED / page.relative_to(HTML)).with_suffix(".glue.json").read_text(encoding="utf-8"))
    seconds = glued.get("seconds", {}).get("data", {}).get("text/plain", "unknown")
    if not seconds.isdigit() or int(seconds) > MOST_SECONDS:
        found.append(f"{name}: takes {seconds} s of processor time, at most {MOST_SECONDS} are allowed")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shots", type=Path, help="save a picture of every page here")
    parser.add_argument("--pages", default="", help="only pages whose path holds this text")
    parser.add_argument("--without-chromium", action="store_true", help="skip what needs a browser")
    options = parser.parse_args()
    pages = sorted(path for path in (HTML / "book").rglob("*.html") if options.pages in str(path))
    if not pages:
        print(f"no pages in {HTML / 'book'}: run make book first")
        return 1
    found = dead_links(pages)
    chapters = [page for page in pages if page.parent.name == "chapters"]
    for page in chapters:
        found += chapter_faults(page)
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if program is None and not options.without_chromium:
        found.append("no Chromium was found; install it, or leave its checks out with --without-chromium")
    if program is not None and not options.without_chromium:
        if options.shots:
            options.shots.mkdir(parents=True, exist_ok=True)
        browser = Browser(program)
        try:
            for page in pages:
                for scheme in ("light", "dark"):
                    where = f"{page.relative_to(HTML)} ({scheme})"
                    found += [f"{where}: {text}" for text in complaints(browser, page, scheme, options.shots)]
        finally:
            browser.close()
    print(*found, sep="\n")
    print(f"{len(pages)} pages, {len(chapters)} of them chapters: {len(found)} complaints")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
