"""judge: a real server that speaks the protocol and judges by a rule, both orders, and what the report makes of it."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tasks import judge
from tasks.params import Judge, UserError
from tests.test_report import Items, answers, made, write_inputs

KEY = "REFORGE_TEST_KEY"


class Endpoint:
    """Answers `POST /v1/chat/completions`: `rule` is given the two answers and says A, B or neither."""

    def __init__(self) -> None:
        self.rule: Any = lambda a, b: "neither"
        self.failures = 0  # requests to turn away before the first is answered
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if endpoint.failures:
                    endpoint.failures -= 1
                    self.send_error(503)
                    return
                if self.path.startswith("/moved"):
                    self.send_response(302)
                    self.send_header("Location", f"{endpoint.url}/chat/completions")
                    self.end_headers()
                    return
                if self.path != "/v1/chat/completions":
                    self.send_error(404)
                    return
                endpoint.asked.append(body)
                endpoint.keys.append(self.headers["Authorization"])
                text = body["messages"][-1]["content"]
                a, b = text.split("Answer A: ")[1].split("\n\nSay in one sentence")[0].split("\n\nAnswer B: ")
                said = json.dumps(
                    {"choices": [{"message": {"role": "assistant", "content": endpoint.rule(a, b)}}]}
                ).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def asked(endpoint: Endpoint, **more: Any) -> tuple[list[dict[str, Any]], Items, Items]:
    before, after = answers("base"), answers("dpo")
    return judge.ask(Judge(url=endpoint.url, model="referee", items=20, **more), before, after), before, after


def kinder(a: str, b: str) -> str:
    """The answer that thanks wins, in the words that a model might choose."""
    return (
        f"One is warmer.\n**Better: {'A' if 'Thank you' in a else 'B'}**"
        if ("Thank you" in a) != ("Thank you" in b)
        else "Better: neither"
    )


def test_off_by_default() -> None:
    assert judge.ask(Judge(), answers("base"), answers("dpo")) == []
    assert judge.tally([], [], []) == {}


def test_both_orders_and_the_key_by_its_name(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")
    endpoint.rule = kinder
    said, before, after = asked(endpoint, api_key=KEY)
    assert set(endpoint.keys) == {"Bearer secret"}
    assert {body["model"] for body in endpoint.asked} == {"referee"}
    assert [row["first"] for row in said] == ["before", "after"] * 20
    texts = {item["id"]: item["answer"] for item in before if "answer" in item}
    for row, body in zip(said, endpoint.asked, strict=True):
        shown_first = body["messages"][0]["content"].split("Answer A: ")[1]
        assert shown_first.startswith(texts[row["id"]]) == (row["first"] == "before")
    found = judge.tally(said, before, after)
    assert found["n"] == found["after"] + found["before"] + found["tied"] == 20
    assert found["before"] == 0
    assert found["after"] >= 5
    assert found["first"] == 0.5
    assert found["agreement"]["kindness"]["value"] == 1.0  # the built-in score sees the same
    assert "secret" not in json.dumps(said)


def test_a_judge_that_likes_what_it_reads_first_decides_nothing(endpoint: Endpoint) -> None:
    endpoint.rule = lambda a, b: "Better: A"
    said, before, after = asked(endpoint)
    found = judge.tally(said, before, after)
    assert (found["tied"], found["after"], found["before"], found["first"], found["p"]) == (20, 0, 0, 1.0, 1.0)
    assert found["agreement"] == {}


def test_replies_that_cannot_be_read_are_counted(endpoint: Endpoint) -> None:
    endpoint.rule = lambda a, b: "I like both."
    said, before, after = asked(endpoint)
    assert judge.tally(said, before, after)["unread"] == 40


def test_a_busy_endpoint_is_asked_again(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge.time, "sleep", lambda seconds: None)
    endpoint.failures = 2
    said, *_ = asked(endpoint)
    assert len(said) == 40
    endpoint.failures = 99
    with pytest.raises(UserError, match="HTTP 503"):
        asked(endpoint)


def test_mistakes_are_one_line(endpoint: Endpoint) -> None:
    with pytest.raises(UserError, match=f"the environment variable {KEY} is not set"):
        asked(endpoint, api_key=KEY)
    with pytest.raises(UserError, match=r"report\.judge\.model: expected the model's name"):
        judge.ask(Judge(url=endpoint.url), [], [])
    before = answers("base")
    with pytest.raises(UserError, match="HTTP 302"):  # the key goes nowhere else
        judge.ask(Judge(url=endpoint.url.replace("/v1", "/moved"), model="m"), before, before)
    assert endpoint.asked == []
    endpoint.url += "/elsewhere"
    with pytest.raises(UserError, match=r"report\.judge: http.*: HTTP 404"):
        asked(endpoint)


def test_in_the_report(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.rule = kinder
    data = write_inputs(tmp_path / "data", curves=False)
    given = {"url": endpoint.url, "model": "referee", "items": 12}
    _, page, text = made(data, judge=given)
    kept = [json.loads(line) for line in (data / "report/judge.jsonl").read_text().splitlines()]
    assert len(kept) == 24
    assert "What another model says" in page
    assert "referee, asked in both orders about 12 questions" in text
    assert "kindness points to its choice in 100.0 %" in text
    made(data, to="off")
    assert (data / "off/judge.jsonl").read_text() == ""
    assert "What another model says" not in (data / "off/report.html").read_text()


@pytest.mark.parametrize(
    ("said", "chosen"),
    [
        ("Better: A", "A"), ("**Better**: B", "B"), ("Better: Answer A", "A"), ("Better: `neither`", ""), ("Better: a tie", ""),
        ("better: **b**", "B"), ("Which is better: the first?", None), ("A is better", None),
    ],
)  # fmt: skip
def test_how_a_judge_names_the_better_one(said: str, chosen: str | None) -> None:
    found = judge.SAID.findall(said)
    assert (found[-1].upper() if found else None) == chosen


def test_a_judge_that_chooses_none_has_no_habit() -> None:
    said = [{"id": "a", "first": side, "said": "", "chose": "neither"} for side in ("before", "after")]
    assert judge.tally(said, [{"id": "a"}], [{"id": "a"}])["first"] is None
