"""What a person sees and clicks: Prefect's page in a real Chromium, over its debugging protocol.

With SCREENSHOTS=docs/images the screenshots of the guide are made anew.
"""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

from tests import server
from tests.conftest import ORDER

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: nothing is clicked (apt-get install chromium)")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync --no-first-run --window-size=1400,1100 --remote-debugging-port=0"


class Browser:
    """One page of a Chromium."""

    def __init__(self, profile: Path) -> None:
        self.process = subprocess.Popen(
            [str(CHROMIUM), *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        port = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 120
        while not port.exists() or len(port.read_text().split()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        number, path = port.read_text().split()
        self.numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []  # what the browser told unasked, oldest first
        self.socket = connect(f"ws://127.0.0.1:{number}{path}", max_size=None)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Page.enable")
        self.send("Log.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        self.socket.send(json.dumps(message))
        while True:
            answer = json.loads(self.socket.recv(timeout=120))
            if "method" in answer:
                self.events.append(answer)
            elif answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def js(self, code: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self) -> str:
        return str(self.js("document.body ? document.body.innerText : ''"))

    def open(self, url: str) -> None:
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=url)

    def failures(self) -> list[str]:
        """Errors in the browser's log, as of what it could not load; oldest first."""
        entries = [event["params"]["entry"] for event in self.events if event["method"] == "Log.entryAdded"]
        return [f"{entry['text']} {entry.get('url', '')}" for entry in entries if entry["level"] == "error"]

    def see(self, *wanted: str, seconds: float = 180, patience: float = 30) -> str:
        """The page's text, once it holds all of these.

        After every `patience` seconds without them the page is loaded again, as a person does: Prefect's page asks for
        its settings once, and stays empty for good when that one request is lost.
        """
        begun = time.monotonic()
        reload = begun + patience
        while True:
            text = self.text()
            missing = [word for word in wanted if word.lower() not in text.lower()]
            if not missing:
                return text
            now = time.monotonic()
            assert now < begun + seconds, f"{missing} not seen in:\n{text}\nfailed: {self.failures()}"
            if now > reload:
                self.send("Page.reload")
                reload = now + patience
            time.sleep(0.3)

    def click(self, label: str) -> None:
        """As a person: the middle of the first visible element with this text."""
        code = f"""(() => {{
            const found = [...document.querySelectorAll('body *')].filter(e => (e.innerText || '').trim() === {label!r} && e.getClientRects().length
                && ![...e.children].some(c => (c.innerText || '').trim() === {label!r}));
            if (!found.length) return null;
            found[0].scrollIntoView({{block: 'center'}});
            const box = found[0].getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()"""
        deadline = time.monotonic() + 120
        while not (place := self.js(code)):
            assert time.monotonic() < deadline, f"nothing to click says {label!r}:\n{self.text()}"
            time.sleep(0.3)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def shoot(self, name: str) -> None:
        """A screenshot for the guide, where SCREENSHOTS names the folder."""
        if "SCREENSHOTS" in os.environ:
            time.sleep(1.5)
            data = self.send("Page.captureScreenshot", format="png")["data"]
            folder = Path(os.environ["SCREENSHOTS"])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.png").write_bytes(base64.b64decode(data))

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def served(pipeline: Path) -> server.Served:
    return server.ui(pipeline)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    page = Browser(tmp_path_factory.mktemp("chromium"))
    yield page
    page.close()


def started(served: server.Served, deployment: str) -> set[str]:
    """Ids of a deployment's flow runs that somebody asked for; the server adds the schedule's own at any moment."""
    runs = served.api.post("flow_runs/filter", {"deployments": {"id": {"any_": [deployment]}}})
    return {run["id"] for run in runs if not run["auto_scheduled"]}


def test_the_deployments_are_listed(served: server.Served, browser: Browser) -> None:
    browser.open(f"{served.api.url}/deployments")
    browser.see("pipeline", "sweep", "retrain", "At 03:30 AM")
    browser.shoot("deployments")


def test_the_form_has_typed_parameters_and_starts_a_run(served: server.Served, browser: Browser) -> None:
    name = served.api.get("deployments/name/pipeline/pipeline")["id"]
    before = started(served, name)
    browser.open(f"{served.api.url}/deployments/deployment/{name}/run")
    browser.see(
        "stages to bring up to date",
        "fetch what is missing from the DVC remote",
        "concurrency limit that GPU stages hold",
    )
    browser.shoot("form")
    browser.click("Submit")
    deadline = time.monotonic() + 120
    while not (new := started(served, name) - before):
        assert time.monotonic() < deadline, browser.text()
        time.sleep(0.3)
    assert served.ended(new.pop())["state"]["message"] == "14 unchanged"


def test_the_form_of_a_sweep_has_choices(served: server.Served, browser: Browser) -> None:
    name = served.api.get("deployments/name/sweep/sweep")["id"]
    browser.open(f"{served.api.url}/deployments/deployment/{name}/run")
    browser.see(
        "refuse a sweep of more points than this", "which end of the first metric comes first", "the values to try"
    )
    browser.shoot("sweep")


def test_a_run_shows_its_stages_and_that_they_were_cached(served: server.Served, browser: Browser) -> None:
    found = served.run("pipeline/pipeline")
    browser.open(f"{served.api.url}/runs/flow-run/{found['id']}")
    browser.see("pipeline", "Completed")
    browser.shoot("run")
    browser.click("Task Runs")
    text = browser.see(*ORDER[:3], "Cached")
    assert text.count("Cached") >= 10
    browser.shoot("stages")


def test_the_report_and_the_metrics_are_rendered(served: server.Served, browser: Browser) -> None:
    text = (served.repo / "params.yaml").read_text()
    assert "beta: 0.3" in text
    (served.repo / "params.yaml").write_text(text.replace("beta: 0.3", "beta: 0.22"))
    try:
        found = served.run("pipeline/pipeline", targets=["dpo"], seconds=240)
    finally:
        (served.repo / "params.yaml").write_text(text)
    assert found["state"]["message"] == "1 ran, 8 unchanged"
    artifacts = served.api.artifacts(found["id"])
    browser.open(f"{served.api.url}/artifacts/artifact/{artifacts['dpo-metrics']['id']}")
    browser.see("dpo-metrics", "loss_last", "head", "change")
    browser.shoot("metrics")
    report = served.api.post("artifacts/filter", {"artifacts": {"key": {"any_": ["report"]}}})[0]
    browser.open(f"{served.api.url}/artifacts/artifact/{report['id']}")
    heading = next(line.lstrip("# ") for line in report["data"].splitlines() if line.startswith("# "))
    browser.see(heading)
    assert browser.js("document.querySelectorAll('table').length") >= 1
    browser.shoot("report")
    browser.open(f"{served.api.url}/runs/flow-run/{found['id']}")
    browser.see("dpo")
    browser.shoot("logs")
    served.run("pipeline/pipeline", seconds=120)
