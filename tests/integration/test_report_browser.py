"""The report's page in a real browser: its charts are drawn, it fits a phone, follows light and dark, and asks nobody.

Driven through chromedriver's plain HTTP (W3C WebDriver). Needs Debian's `chromium` and `chromium-driver`.
"""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.report import write
from deploy.report.page import COLORS

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
MISSING = [str(path) for path in (CHROMIUM, DRIVER) if not path.exists()]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no browser to look with: {', '.join(MISSING)} not installed")

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
]
PHONE, DESKTOP = 375, 1280
TIMEOUT_S = 60
WORKERS = ["worker-1", "worker-2", "<b>a name of sixty-four characters, none of which is a place to break"]
UPDATES = 300


class Browser:
    """One headless tab."""

    def __init__(self, address: str) -> None:
        wanted = {
            "goog:chromeOptions": {"binary": str(CHROMIUM), "args": FLAGS},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self._base = f"{address}/session"
        self._base += f"/{self._post('', {'capabilities': {'alwaysMatch': wanted}})['sessionId']}"

    def _post(self, path: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._base + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return json.load(answer)["value"]

    def command(self, name: str, **parameters: Any) -> Any:
        """One command of the Chrome DevTools Protocol."""
        return self._post("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def open(self, page: Path, *, width: int = DESKTOP, scheme: str = "light") -> None:
        """Show the page at this width, for one who prefers this color scheme."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < DESKTOP}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._post("/url", {"url": page.as_uri()})

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self._post("/execute/sync", {"script": f"return {expression}", "args": []})

    def complaints(self) -> Any:
        """What the console holds: errors, and everything that the page's policy kept from loading."""
        return self._post("/se/log", {"type": "browser"})

    def close(self) -> None:
        request = urllib.request.Request(self._base, method="DELETE")
        urllib.request.urlopen(request, timeout=TIMEOUT_S).close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            ports = (re.search(r"started successfully on port (\d+)", line) for line in driver.stdout)
            port = next(found[1] for found in ports if found)
            tab = Browser(f"http://127.0.0.1:{port}")
            yield tab
            tab.close()
        finally:
            driver.terminate()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three workers under `gem`."""
    directory, chance = tmp_path_factory.mktemp("run"), random.Random(0)
    lines: list[dict[str, Any]] = [
        {"time": 0.0, "kind": "join", "worker": name, "role": "worker", "resumed": "new"} for name in WORKERS
    ]
    for i in range(UPDATES):
        counts = {"samples": 64, "steps": 2, "bytes_up": 100_000, "bytes_down": 200_000, "weight": 1.0}
        rule = {"pi_median": chance.random(), "pi_mean": chance.random(), "energy_ratio": chance.random()}
        loss = 2 * math.exp(-i / 50) + 0.05 * chance.random()
        line = {"time": 1 + i / 50, "kind": "apply", "worker": chance.choice(WORKERS), "lag": chance.randrange(12)}
        lines.append(line | counts | rule | {"version": i + 1, "number": i + 1, "loss": loss})
    (directory / "run.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    curve = [
        {
            "time_s": i / 50,
            "updates": i,
            "samples": i * 64,
            "loss": math.exp(-i / 50),
            "accuracy": 1 - math.exp(-i / 50),
        }
        for i in range(0, UPDATES, 10)
    ]
    setting = {"name": "directory", "value": "/a/long/" + "path/" * 30, "origin": "flag", "description": "where"}
    measured = {"center_accuracy": 0.98, "solo_accuracy": 0.9, "curve": curve, "solo_curve": curve}
    return write(directory, measured | {"settings": [setting], "rule": "gem", "task": "digits"})[1]


def test_every_chart_is_drawn(browser: Browser, page: Path) -> None:
    browser.open(page)
    size = "path => [path.getTotalLength(), path.getBoundingClientRect().width]"
    drawn = browser.ask(f"[...document.querySelectorAll('.plot > svg path')].map({size})")
    assert len(drawn) == 2 * (len(WORKERS) + 1) + 2 + 2 + 2 + 1, "loss twice, accuracy, bytes, pi, energy"
    assert all(length > 100 and width > 100 for length, width in drawn), drawn
    bars = browser.ask("[...document.querySelectorAll('.bars')].map(s => [...s.querySelectorAll('rect')].length)")
    assert len(bars) == len(WORKERS)
    tallest = browser.ask(
        "Math.max(...[...document.querySelectorAll('.bars rect')].map(r => r.getBoundingClientRect().height))"
    )
    assert tallest == pytest.approx(
        browser.ask("document.querySelector('.bars').getBoundingClientRect().height"), abs=2
    )


def test_curves_stay_inside_their_chart(browser: Browser, page: Path) -> None:
    browser.open(page)
    outside = """[...document.querySelectorAll('.plot > svg')].flatMap(svg => {
        const box = svg.getBoundingClientRect()
        return [...svg.querySelectorAll('path')].map(path => path.getBoundingClientRect()).filter(
            p => p.left < box.left - 4 || p.right > box.right + 4 || p.top < box.top - 4 || p.bottom > box.bottom + 4)
    }).length"""
    assert browser.ask(outside) == 0


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_it_never_scrolls_sideways(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    browser.ask("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert browser.ask("window.innerWidth") == width
    assert browser.ask("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    clipped = "[...document.querySelectorAll('.card')].filter(card => card.scrollWidth > card.clientWidth).length"
    assert browser.ask(clipped) == 0, "what is too wide scrolls inside its own box"


def test_text_of_charts_is_as_large_on_a_phone(browser: Browser, page: Path) -> None:
    heights = []
    for width in (PHONE, DESKTOP):
        browser.open(page, width=width)
        heights.append(browser.ask("document.querySelector('.plot text').getBoundingClientRect().height"))
    assert heights[0] == pytest.approx(heights[1])
    assert heights[0] > 10


def test_it_follows_light_and_dark(browser: Browser, page: Path) -> None:
    """And all stands out in both (WCAG AA: text by 4.5, the colors of curves by 3)."""
    grounds = []
    for scheme in ("light", "dark"):
        browser.open(page, scheme=scheme)
        color = "getComputedStyle(document.querySelector('{}')).{}"
        card = browser.ask(color.format(".card", "backgroundColor"))
        grounds.append(card)
        for text in ("h1", ".tiles small", "td", "figcaption p"):
            assert contrast(browser.ask(color.format(text, "color")), card) >= 4.5, (scheme, text)
        assert contrast(browser.ask(color.format(".plot text", "fill")), card) >= 4.5, scheme
        for i in range(COLORS):
            browser.ask(f"document.querySelector('.plot path').setAttribute('class', 'c{i}')")
            assert contrast(browser.ask(color.format(".plot path", "stroke")), card) >= 3, (scheme, i)
    assert len(set(grounds)) == 2


def test_it_asks_nobody_and_complains_of_nothing(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.ask("performance.getEntriesByType('resource').map(entry => entry.name)") == []
    assert browser.ask("document.scripts.length") == 0
    assert browser.complaints() == []


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast of two colors `rgb(r, g, b)`."""

    def luminance(color: str) -> float:
        shares = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        r, g, b = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)
