"""What changed between two revisions, and whether it is significant: on two runs of the pipeline, and on planted answers."""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import astuple
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from ruamel.yaml import YAML

from flows import diff
from tasks.params import Report, UserError
from tests.conftest import ROOT, commit, edit, fork, ran, run

ANSWERS = "data/evaluate/dpo.answers.jsonl"


@pytest.fixture(scope="module")
def two(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline's clone with a second commit: another beta, and what it made; everything is on a directory remote."""
    folder = tmp_path_factory.mktemp("two")
    repo = fork(pipeline, folder / "repo")
    edit(repo, "dpo", "beta", 0.05)
    assert len(ran(run("dvc repro", repo).stdout)) == 4
    commit(repo, "beta")
    run(f"dvc remote add -d --local store {folder / 'store'} && dvc push --all-commits", repo)
    return repo


def page(repo: Path, *revisions: str) -> tuple[str, str]:
    """Markdown and HTML, by the command."""
    done = run([sys.executable, "-m", "flows.diff", *revisions], repo)
    assert done.stdout.startswith("diff: "), done.stdout
    assert len(done.stdout.splitlines()) == 1
    return (repo / "tmp/diff.md").read_text(), (repo / "tmp/diff.html").read_text()


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """Cells of the tables' rows, heads left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line, below in zip(lines, [*lines[1:], ""], strict=True)
        if not set(line) <= set("|- ") and not set(below) <= set("|- ") | {""}
    ] + ([[cell.strip() for cell in lines[-1].strip("|").split("|")]] if lines else [])


class Outside(HTMLParser):
    """What a page would load from elsewhere, and whether its tags fit together."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        for name in ("src", "href", "xlink:href"):
            if (names.get(name) or "#")[0] != "#" and not (names.get(name) or "").startswith("data:"):
                self.found.append(f"{tag} {name}={names[name]}")
        if tag in ("script", "img", "iframe"):
            self.found.append(tag)
        if tag in ("table", "details", "svg", "figure", "main", "div"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("table", "details", "svg", "figure", "main", "div"):
            assert self.open.pop() == tag


def test_two_runs_of_the_pipeline(two: Path) -> None:
    difference = json.loads(run("dvc metrics diff HEAD~1 --json", two).stdout)
    numbers = [v["diff"] for found in difference.values() for v in found.values() if "diff" in v]
    assert numbers
    assert all(isinstance(number, (int, float)) for number in numbers)
    assert any(numbers)
    text, html = page(two, "HEAD~1", "HEAD")
    assert rows(section(text, "Parameters")) == [["<code>dpo.beta</code>", "<code>0.3</code>", "<code>0.05</code>"]]
    stages = section(text, "Stages")
    assert [row[0] for row in rows(stages)] == ["dpo", "merge", "evaluate@dpo", "report"]
    assert rows(stages)[0][1:3] == ["<code>dpo.beta</code>", "–"]
    assert rows(stages)[1][1:3] == ["–", "dpo"]
    assert "10 unchanged" in stages
    figures = {row[0]: row for row in rows(section(text, "Other figures"))}
    margin = difference["data/dpo/metrics.json"]["rewards_margins"]
    assert figures["dpo rewards_margins"][1:3] == [f"{margin['old']:.4g}", f"{margin['new']:.4g}"]
    assert "The same answers, byte for byte: base, sft." in text
    assert "none significantly" in text.splitlines()[4]  # four items a set can't show anything
    assert "dpo: train/loss" in section(text, "Curves")
    assert "4 of 14 stages and 1 parameter changed" in text
    # one page, self-contained, both revisions in one drawing
    outside = Outside(html)
    assert outside.found == []
    assert outside.open == []
    drawing = next(d for d in re.findall(r"<figure>.*?</figure>", html, re.DOTALL) if "dpo: train/loss" in d)
    assert "var(--before)" in drawing
    assert "var(--after)" in drawing
    assert len(set(re.findall(r' id="([^"]+)"', html))) == len(re.findall(r' id="([^"]+)"', html))
    again = hashlib.sha256(html.encode()).hexdigest()
    assert hashlib.sha256(page(two, "HEAD~1", "HEAD")[1].encode()).hexdigest() == again
    assert str(two) not in text + html


def test_the_workspace_is_the_other_side(two: Path, tmp_path: Path) -> None:
    repo = fork(two, tmp_path / "repo")
    assert "no measure moved" in page(repo, "HEAD")[0]
    assert page(repo, "HEAD~1")[0].count("dpo: ") == page(repo, "HEAD~1", "HEAD")[0].count("dpo: ")
    edit(repo, "lora", "r", 3)
    text, _ = page(repo, "HEAD")
    assert rows(section(text, "Parameters")) == [["<code>lora.r</code>", "<code>2</code>", "<code>3</code>"]]
    assert "Not up to date in the workspace, so its figures may be of another run" in text
    assert "sft" in next(line for line in text.splitlines() if "Not up to date" in line)


def test_answers_come_from_the_remote_and_without_it_the_page_says_so(two: Path, tmp_path: Path) -> None:
    run(f"git clone -q {two} other", tmp_path)
    other = tmp_path / "other"
    text, _ = page(other, "HEAD~1", "HEAD")
    assert "The answers of dpo at HEAD~1, dpo at HEAD are neither in the cache nor on the remote" in text.replace(
        "&#126;", "~"
    )
    measures = rows(section(text, "Measures"))
    assert all(row[5:7] == ["–", "–"] for row in measures)
    perplexity = next(row for row in measures if row[1] == "Perplexity of the reference, trained terms")
    figures = json.loads((two / "data/evaluate/dpo.json").read_text())["answers"]["trained"]["perplexity"]
    assert perplexity[3] == "{value:.2f} [{low:.2f}, {high:.2f}]".format(**figures)
    run(f"dvc remote add -d --local store {two.parent / 'store'}", other)
    assert page(other, "HEAD~1", "HEAD")[0].replace(" 1 up", "") == page(two, "HEAD~1", "HEAD")[0].replace(" 1 up", "")
    assert not (other / ANSWERS).exists()


# --- planted differences -----------------------------------------------------------------------------------------------


def planted(better: bool) -> list[dict[str, Any]]:
    """120 items; `better`: 30 of 60 invented terms more are declined, recall falls, kindness is noise, the rest is equal."""
    noise = random.Random(better)
    items = []
    for n in range(60):
        recall = 0.5 + n / 200 - (0.1 + n / 1000 if better else 0)
        items.append(
            {"id": f"a{n:03}", "set": "trained", "task": "definition", "term": f"t{n}", "question": f"What is t{n}?", "correct": float(n % 3 == 0),
             "nll": 1.0 + n / 60, "answer": "x", "reference": "y", "declined": 0.0, "recall": recall, "kindness": 0.5 + noise.gauss(0, 0.1), "loops": 0.0, "empty": 0.0,
             "odd_measure": float(n + 5 * better)}
        )  # fmt: skip
        items.append({"id": f"b{n:03}", "set": "invented", "task": "definition", "term": f"i{n}", "question": f"What is i{n}?", "answer": "x", "reference": "", "declined": float(n < (40 if better else 10))})  # fmt: skip
    return items


def as_text(items: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


@pytest.fixture(scope="module")
def story(two: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commits more, whose answers of the DPO model were written by hand and committed to DVC."""
    repo = fork(two, tmp_path_factory.mktemp("story") / "repo")
    for better in (False, True):
        (repo / ANSWERS).unlink()
        (repo / ANSWERS).write_text(as_text(planted(better)))
        run("dvc commit -f evaluate@dpo", repo)
        commit(repo, f"'planted | <b>{better}</b>'")
    return repo


def test_a_planted_difference_is_significant_and_an_equal_measure_is_not(story: Path) -> None:
    text, html = page(story, "HEAD~1", "HEAD")
    found = {row[1]: row for row in rows(section(text, "Measures"))}
    declined = found["Invented terms declined"]
    assert declined[-1] == "**▲ better**"
    assert declined[2:4] == ["16.7 %", "66.7 %"]
    assert "+50.0 points [" in declined[4]
    assert "30 up, 0 down of 60" in declined[4]
    assert declined[5:7] == ["h +1.07, large", "< 0.0001"]
    assert found["Reference's words in its answer, trained terms"][-1] == "**▼ worse**"
    assert found["Kindness (classifier, 0–1)"][-1] == "= no different"
    assert found["odd&#95;measure" if "odd&#95;measure" in found else "odd_measure"][-1] == "**◆ changed**"
    assert "Definition, trained terms, new wording" not in found  # equal on every item: folded
    assert re.search(
        r"<details><summary>\d+ the same on every item</summary>[^#]*Definition, trained terms, new wording 33.3 %",
        text,
    )
    assert [row[-1] for row in rows(section(text, "Measures"))][:3] == ["**▼ worse**", "**▲ better**", "**◆ changed**"]
    assert "significantly 1 worse, 1 better, 1 changed" in text
    assert '<span class="call better">▲ better</span>' in html
    assert "<b>True" not in text + html  # a commit's subject is no markup
    assert "<b>True" not in html
    # the other way round
    back = {row[1]: row[-1] for row in rows(section(page(story, "HEAD", "HEAD~1")[0], "Measures"))}
    assert back["Invented terms declined"] == "**▼ worse**"


def test_only_the_same_question_is_a_pair() -> None:
    before, after = planted(False), planted(False)
    after[0]["question"] = "Another one?"
    after[2]["reference"] = "another"
    after[4]["id"] = "new"
    assert len(diff._shared(before, after)) == len(before) - 3


def test_by_intervals() -> None:
    def ends(value: float, low: float, high: float, n: int = 50) -> dict[str, float]:
        return {"value": value, "low": low, "high": high, "n": n}

    def call(key: str, *sides: dict[str, float]) -> str:
        return diff.by_intervals("dpo", key, *sides).call

    assert call("answers.trained.recall", ends(0.5, 0.4, 0.6), ends(0.8, 0.7, 0.9)) == "better"
    assert call("answers.trained.recall", ends(0.5, 0.4, 0.6), ends(0.65, 0.58, 0.7)) == "no different"
    assert call("answers.trained.recall", ends(0.5, 0.4, 0.6), ends(0.5, 0.4, 0.6)) == "same"
    assert call("answers.trained.perplexity", ends(2, 1.9, 2.1), ends(3, 2.5, 3.5)) == "worse"
    assert call("form.characters", ends(100, 90, 110), ends(200, 190, 210)) == "changed"
    assert call("custom.thing", ends(100, 90, 110), ends(200, 190, 210)) == "changed"
    # 3 of 4 against 4 of 4: the bootstrap's interval of the latter has no width, which shows nothing
    assert call("general.accuracy", ends(0.5, 0.25, 0.75, 4), ends(1, 1, 1, 4)) == "no different"
    assert call("general.accuracy", ends(0.5, 0.4, 0.6, 100), ends(1, 1, 1, 100)) == "better"


def test_stages_between() -> None:
    def stage(cmd: str, deps: dict[str, str], outs: dict[str, str], **params: Any) -> dict[str, Any]:
        files = {
            kind: [{"path": p, "md5": m} for p, m in found.items()] for kind, found in (("deps", deps), ("outs", outs))
        }
        return {"cmd": cmd, **files, "params": {"params.yaml": params}}

    before = {
        "z": stage("z", {"raw": "1"}, {"z": "1"}),
        "a": stage("a", {"z": "1", "code.py": "1"}, {"a": "1"}, a={"x": {"y": 1}, "w": 2}),
        "b": stage("b", {"a/inner": "1"}, {"b": "1"}),
        "gone": stage("g", {}, {"g": "1"}),
    }
    after = {
        "z": stage("z", {"raw": "2"}, {"z": "1"}),
        "a": stage("a2", {"z": "1", "code.py": "2"}, {"a": "2"}, a={"x": {"y": 3}, "w": 2}),
        "b": stage("b", {"a/inner": "2"}, {"b": "1"}),
        "fresh": stage("f", {"b": "1"}, {"f": "1"}),
    }
    changed, kept = diff.stages_between(before, after)
    found = {s.name: astuple(s)[1:] for s in changed}
    assert found["z"] == (("raw",), (), False)
    assert found["a"] == (("command", "a.x.y", "code.py"), (), True)  # z made the same bytes
    assert found["b"] == ((), ("a",), False)
    assert found["gone"][0] == ("removed",)
    assert found["fresh"][0] == ("new",)
    assert kept == []
    assert diff.stages_between(before, before) == ([], ["z", "gone", "a", "b"])


def test_a_changed_ruler_is_said(two: Path, tmp_path: Path) -> None:
    repo = fork(two, tmp_path / "repo")
    lock = YAML(typ="safe").load(repo / "dvc.lock")
    changed = diff.stages_between(
        lock["stages"], json.loads(json.dumps(lock["stages"]).replace('"max_new_tokens": 8', '"max_new_tokens": 9'))
    )[0]
    assert {s.name for s in changed} == {"evaluate@base", "evaluate@sft", "evaluate@dpo"}
    assert diff._ruler(changed) == [
        "The evaluation itself changed (evaluate.max_new_tokens): a difference may come from how it was measured."
    ]


def test_a_page_that_is_too_long_for_a_comment_is_cut(story: Path) -> None:
    found = diff.diff(story, "HEAD~1", "HEAD")
    object.__setattr__(found, "params_kept", [(f"section.key{n}", "v" * 100) for n in range(1000)])
    short = diff.markdown(found)
    assert len(short) < diff.LIMIT
    assert "left out here" in short
    assert "▲ better" in short
    assert "section.key999" in diff.html(found)
    object.__setattr__(found, "params", [(f"section.key{n}", 1, "v" * 2000) for n in range(100)])
    assert len(diff.markdown(found)) <= diff.LIMIT


@pytest.mark.parametrize(
    "text", ["a|b", "<script>alert(1)</script>", "`x`", "*x*", "[x](http://y)", "_x_", "$x$", "# x", "a\nb", "&amp;"]
)
def test_texts_are_shown_as_they_are(story: Path, text: str) -> None:
    found = diff.Page(
        ("a", "b"),
        (text, text),
        [],
        [],
        [(text, text, None)],
        [],
        [],
        [("data/x/metrics.json", text, 1, 2)],
        0,
        [],
        0,
        0.05,
        [text],
    )
    shown = diff.html(found)

    class Texts(HTMLParser):
        seen = ""

        def handle_data(self, data: str) -> None:
            self.seen += data

    parser = Texts()
    parser.feed(shown.split('<main class="diff">')[1])
    assert parser.seen.count(" ".join(text.split())) >= 5
    assert "<script" not in shown
    assert "<a " not in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["no-such-branch"], "no-such-branch: no such revision here"),
        (["HEAD", "HEAD~99"], "HEAD~99: no such revision here"),
        (["HEAD", "--out", "page.html"], "expected a name that ends in .md"),
    ],
)
def test_a_mistake_is_one_line(two: Path, arguments: list[str], expected: str) -> None:
    done = run([sys.executable, "-m", "flows.diff", *arguments], two, check=False)
    assert done.returncode == 1
    assert expected in done.stdout
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("text", ["<<<<<<< HEAD\nstages:\n", "stages:\n  a: [\n", "a line\n"])
def test_a_lock_file_that_is_none_is_one_line(two: Path, tmp_path: Path, text: str) -> None:
    repo = fork(two, tmp_path / "repo")
    (repo / "dvc.lock").write_text(text)
    done = run([sys.executable, "-m", "flows.diff", "HEAD"], repo, check=False)
    assert done.returncode == 1
    assert "dvc.lock is no YAML, or has no stages" in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_a_revision_without_a_run(two: Path) -> None:
    first = run("git rev-list --max-parents=0 HEAD", two).stdout.strip()
    text, _ = page(two, first, "HEAD")
    assert "has no dvc.lock: no stage had run there" in text
    assert "Evaluated at one of the two revisions only, so not compared: base, dpo, sft." in text
    assert {row[1] for row in rows(section(text, "Stages"))} == {"<code>new</code>"}


# --- the examples for CI -----------------------------------------------------------------------------------------------


@pytest.fixture
def api() -> Iterator[tuple[str, list[tuple[str, str, str]], list[dict[str, Any]]]]:
    """An HTTP server that keeps comments as GitHub and GitLab do: its address, the requests that wrote, the comments."""
    wrote: list[tuple[str, str, str]] = []
    comments: list[dict[str, Any]] = [{"id": 6, "body": "a person's"}]

    class Handler(BaseHTTPRequestHandler):
        def answer(self, content: Any, code: int = 200) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def do_GET(self) -> None:
            self.answer(comments)

        def write(self) -> None:
            text = self.rfile.read(int(self.headers["Content-Length"])).decode()
            token = self.headers["Authorization"] or self.headers["PRIVATE-TOKEN"]
            body = json.loads(text)["body"] if text.startswith("{") else parse_qs(text)["body"][0]
            wrote.append((self.command, self.path, token))
            if self.command == "POST":
                comments.append({"id": 7, "body": body})
            else:
                next(c for c in comments if str(c["id"]) == self.path.split("/")[-1])["body"] = body
            self.answer({})

        do_POST = do_PATCH = do_PUT = write

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", wrote, comments
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def checkout(story: Path, tmp_path: Path) -> Path:
    """A clone as a CI runner has it, without outputs, whose `make setup` has nothing to do."""
    environment = Path(sys.executable).parent.parent
    if not (environment / ".lock-installed").is_file():
        pytest.skip("the environment was not made by `make setup`, which would begin to install one")
    run(f"git clone -q {story} checkout", tmp_path)
    repo = tmp_path / "checkout"
    run(f"dvc remote add -d --local store {story / '.dvc/cache'}", repo)
    (repo / ".venv").symlink_to(environment)
    os.utime(repo / "requirements.lock", (0, 0))
    return repo


def script(commands: str, repo: Path, **env: str) -> None:
    done = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", commands], cwd=repo, env=os.environ | env, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(
    not shutil.which("jq") or not shutil.which("curl"), reason="the example needs curl and jq, as runners have"
)
def test_the_github_example(checkout: Path, api: Any, tmp_path: Path) -> None:
    address, wrote, comments = api
    text = (ROOT / "docs/ci/github.yml").read_text()
    workflow = YAML(typ="safe").load(text)
    assert workflow["on"] == "pull_request"
    assert workflow["permissions"] == {"contents": "read", "pull-requests": "write"}
    (job,) = workflow["jobs"].values()
    steps = {step["name"]: step for step in job["steps"] if "run" in step}
    assert list(steps) == ["Set up", "Compare", "Comment"]
    # text of a pull request never becomes part of a command
    assert not any("${{" in step["run"] for step in steps.values())
    assert next(s for s in job["steps"] if s.get("uses", "").startswith("actions/checkout"))["with"]["fetch-depth"] == 0
    run("git update-ref refs/remotes/origin/main HEAD~1", checkout)
    github = {
        "GITHUB_API_URL": address, "GITHUB_REPOSITORY": "team/reforge", "GITHUB_BASE_REF": "main", "NUMBER": "12", "GH_TOKEN": "token",
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
    }  # fmt: skip
    script(steps["Set up"]["run"], checkout, **github)
    script(steps["Compare"]["run"], checkout, **github)
    assert (
        checkout / next(s for s in job["steps"] if "upload-artifact" in s.get("uses", ""))["with"]["path"]
    ).is_file()
    assert "▲ better" in (tmp_path / "summary.md").read_text()
    script(steps["Comment"]["run"], checkout, **github)
    assert wrote == [("POST", "/repos/team/reforge/issues/12/comments", "Bearer token")]
    assert comments[-1]["body"] == (checkout / "tmp/diff.md").read_text()
    (checkout / "tmp/diff.md").write_text("<!-- reforge diff -->\nafter another push: \"ä\" & 'ö'\n")
    script(steps["Comment"]["run"], checkout, **github)
    assert wrote[1:] == [("PATCH", "/repos/team/reforge/issues/comments/7", "Bearer token")]
    assert comments == [
        {"id": 6, "body": "a person's"},
        {"id": 7, "body": "<!-- reforge diff -->\nafter another push: \"ä\" & 'ö'\n"},
    ]


@pytest.mark.skipif(not shutil.which("curl"), reason="the example needs curl, as runners have")
def test_the_gitlab_example(checkout: Path, api: Any) -> None:
    address, wrote, comments = api
    (job,) = YAML(typ="safe").load((ROOT / "docs/ci/gitlab.yml").read_text()).values()
    assert job["variables"]["GIT_DEPTH"] == "0"
    gitlab = {
        "CI_API_V4_URL": f"{address}/api/v4", "CI_PROJECT_ID": "5", "CI_MERGE_REQUEST_IID": "12", "GITLAB_TOKEN": "token",
        "CI_MERGE_REQUEST_DIFF_BASE_SHA": run("git rev-parse HEAD~1", checkout).stdout.strip(),
    }  # fmt: skip
    script("\n".join(job["script"]), checkout, **gitlab)
    assert all((checkout / path).is_file() for path in job["artifacts"]["paths"])
    assert wrote == [("POST", "/api/v4/projects/5/merge_requests/12/notes", "token")]
    assert comments[-1]["body"] == (checkout / "tmp/diff.md").read_text()
    assert "▲ better" in comments[-1]["body"]
    script(job["script"][-1], checkout, **gitlab)
    assert wrote[1:] == [("PUT", "/api/v4/projects/5/merge_requests/12/notes/7", "token")]
    assert len(comments) == 2


def test_two_revisions_are_needed_by_the_function(two: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such revision"):
        diff.diff(two, "nowhere")


@pytest.mark.parametrize("same", [True, False])
def test_a_figure_that_no_answer_holds_is_compared_by_its_intervals(same: bool) -> None:
    """The harness' tasks have no answers; nor has anything, where the test was drawn anew and shares no question."""
    ends = {"value": (0.8, 0.2), "low": (0.75, 0.15), "high": (0.85, 0.25), "n": (300, 300)}
    both = {end: {"old": old, "new": new} for end, (old, new) in ends.items()}
    stems = ("lm_eval.my_task.acc", "general.accuracy")
    metrics = {"data/evaluate/dpo.json": {f"{stem}.{end}": value for stem in stems for end, value in both.items()}}
    one = {"id": "a", "set": "general", "task": "choice", "question": "q", "correct": 1.0}
    items = {"dpo": None if same else ([one], [one | {"id": "b"}])}
    found, _, _ = diff._measures(metrics, items, Report(), [])
    said = {(m.measure.key, m.call) for m in found if m.before != m.after}
    assert said == {(stems[0], "changed")} | (set() if same else {(stems[1], "worse")})
