"""Experiments: definitions that are checked, points that reuse what is there and survive a kill, and honest verdicts."""

import contextlib
import csv
import json
import re
import signal
import sys
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from flows import experiments, findings, worktrees
from flows.findings import Cost, Run
from tasks import params
from tasks.params import UserError
from tests import small
from tests.conftest import ROOT, commit, fork, run

COMMAND = [sys.executable, "-m", "flows.experiments"]
RECALL = "data/evaluate/dpo.json:answers.trained.recall"
KINDNESS = "data/evaluate/dpo.json:manner.kindness"
LOSS = "data/dpo/metrics.json:loss_last"


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of dvc, in process

# --- definitions ------------------------------------------------------------------------------------------------------

BETA = """\
beta:
  question: Does β matter?
  arms:
    β 0.1: {dpo.beta: 0.1, dpo.max_steps: 16, dpo.save_strategy: steps, dpo.save_steps: 1}
    β 0.3: {dpo.beta: 0.3}
  seeds: [42, 7]
  targets: [evaluate@dpo]
  metrics:
    - data/evaluate/dpo.json:answers.trained.recall
    - data/evaluate/dpo.json:kl.to_reference
    - data/dpo/metrics.json:loss_last
  curves: [data/dpo/plots/metrics/train/loss.tsv]
"""


@pytest.fixture
def definitions(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (tmp_path / "experiments.yaml").write_text(text)
        return tmp_path / "experiments.yaml"

    return write


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("question:", "qestion:", "beta.qestion: unknown key, did you mean `question`?"),
        ("seeds: [42, 7]", "seeds: [42, 42]", "beta.seeds: the same seed comes twice"),
        ("β 0.3: {dpo.beta: 0.3}", "α 0.1: {}", "beta.arms: labels that differ in letters or digits expected, found ['β 0.1', 'α 0.1']"),
        ("{dpo.beta: 0.3}", "{seed: 1}", "beta.arms.β 0.3.seed: not settable here, set beta.seeds"),
        ("seeds: [42, 7]", "seeds: [-1]", "beta.seeds.0: input should be greater than or equal to 0, found -1"),
        ("seeds: [42, 7]", "seeds: 42", "beta.seeds: input should be a valid list, found 42"),
        ("data/dpo/metrics.json:loss_last", "loss_last", "beta.metrics.2: string should match pattern"),
        ("beta:\n", "Beta 1:\n", "Beta 1: expected a name of small letters, digits and dashes"),
        ("beta:\n", "beta: [\n", "not valid YAML"),
    ],
)  # fmt: skip
def test_a_faulty_definition_is_refused(definitions: Callable[[str], Path], before: str, after: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        experiments.load(definitions(BETA.replace(before, after)))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_example_of_the_docs_and_numbers_as_labels(definitions: Callable[[str], Path]) -> None:
    shown = (ROOT / "docs/experiments/README.md").read_text().split("```yaml\n")[1].split("```")[0]
    (example,) = experiments.load(definitions(shown)).values()
    assert [*example.arms] == ["lr 6e-4", "lr 2e-4"]
    (numbers,) = experiments.load(definitions(BETA.replace("β 0.1:", "0.1:").replace("β 0.3:", "8:"))).values()
    assert [*numbers.arms] == ["0.1", "8"]


def test_a_page_that_can_not_be_made_costs_no_other(
    definitions: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = definitions(f"{BETA}\n{BETA.replace('beta:', 'other:', 1)}").parent

    def page(repo: Path, name: str, *_: object) -> Path:
        if name == "beta":
            raise UserError("beta: nothing is recorded on this machine")
        return repo / f"docs/experiments/{name}.md"

    monkeypatch.chdir(folder)
    monkeypatch.setattr(experiments, "points", lambda *_: {})
    monkeypatch.setattr(experiments, "page", page)
    assert experiments.main(["--page-only"]) == 1
    out, err = capsys.readouterr()
    assert out == "experiments: docs/experiments/other.md\n"
    assert err == "experiments: beta: nothing is recorded on this machine\n"


def test_an_unknown_name_is_refused(definitions: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"bta: no such experiment in experiments.yaml, did you mean `beta`"):
        experiments.chosen(experiments.load(definitions(BETA)), ["bta"])


class TestPoints:
    @pytest.mark.parametrize(
        ("before", "after", "said"),
        [
            ("dpo.beta: 0.3", "dpo.bta: 0.3", "beta.arms.β 0.3: dpo.bta: unknown key, did you mean `beta`?"),
            ("dpo.beta: 0.3", "dpo.beta: -1", "beta.arms.β 0.3: dpo.beta: expected a number > 0, found -1"),
            ("dpo.beta: 0.3", "ingest.sources.9.terms: 8", "ingest.sources.9.terms: params.yaml has no section that holds `9`"),
            ("[evaluate@dpo]", "[evaluate@dop]", "evaluate@dop: no such stage in dvc.yaml, did you mean `evaluate@dpo`?"),
            ("data/dpo/metrics.json", "data/dpo/metric.json", "data/dpo/metric.json is no metrics file of these targets, did you mean `data/dpo/metrics.json`?"),
            ("[evaluate@dpo]", "[evaluate@sft]", "data/evaluate/dpo.json is no metrics file of these targets"),
            ("kl.to_reference", "kl.to_referense", "data/evaluate/dpo.json has no figure `kl.to_referense` here, did you mean `kl.to_reference`?"),
            ("data/dpo/plots/metrics", "data/dop/plots/metrics", "data/dop/plots/metrics/train/loss.tsv is no output of these targets"),
        ],
    )  # fmt: skip
    def test_are_checked_before_any_runs(
        self, pipeline: Path, definitions: Callable[[str], Path], before: str, after: str, said: str
    ) -> None:
        (definition,) = experiments.load(definitions(BETA.replace(before, after))).values()
        with pytest.raises(UserError) as error:
            experiments.points(pipeline, "beta", definition)
        assert said in str(error.value)

    def test_figures_that_arms_switch_on_and_values_of_figures(
        self,
        tmp_path: Path,
        definitions: Callable[[str], Path],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        figures = tmp_path / "data/evaluate/dpo.json"
        figures.parent.mkdir(parents=True)
        figures.write_text(json.dumps({"manner": {"kindness": {"value": 0.5}}, **{f"k{n}": n for n in range(9)}}))
        made = SimpleNamespace(name="evaluate@dpo", outputs=["data/evaluate"], metrics=["data/evaluate/dpo.json"])
        monkeypatch.setattr(experiments, "_planned", lambda *_: [made])
        monkeypatch.setattr(experiments, "_recipes", lambda *_: {})
        monkeypatch.setattr(worktrees, "settings", lambda _: params.read(ROOT / "params.yaml"))

        def points(arm: str, figure: str) -> None:
            text = f"e: {{question: q, arms: {{a: {{}}, b: {{{arm}}}}}, targets: [x], metrics: ['data/evaluate/dpo.json:{figure}']}}\n"
            (definition,) = experiments.load(definitions(text)).values()
            experiments.points(tmp_path, "e", definition)

        for figure in ("manner.kindness", "manner.kindness.value", "k3"):
            points("dpo.beta: 0.3", figure)
        assert capsys.readouterr().out == ""
        with pytest.raises(UserError, match=r"no figure `lm_eval\.arc\.acc` here; there are .* and 5 more$"):
            points("dpo.beta: 0.3", "lm_eval.arc.acc")
        points("evaluate.lm_eval: {tasks: [arc]}", "lm_eval.arc.acc")
        assert "note: e.metrics: data/evaluate/dpo.json has no figure `lm_eval.arc.acc` here; the page needs it of every arm" in capsys.readouterr().out  # fmt: skip

    def test_the_shipped_ones_are_valid_and_ask_what_they_say(self, pipeline: Path) -> None:
        every = experiments.load(ROOT / "experiments.yaml")
        assert set(every) == {"rank", "targets", "quantization", "beta", "merge", "data", "epochs"}
        arms = {name: experiments.points(pipeline, name, experiment) for name, experiment in every.items()}
        assert all(len(experiment.seeds) == 3 for experiment in every.values())
        beta = arms["beta"]["β 0.1"][42]
        assert beta.values == {"dpo.beta": 0.1}
        # the default is one point, by whatever values it is described, and merge's arms are one
        for name in ("targets", "quantization"):
            assert "seed" in list(arms[name].values())[-1][43].values
        trained = [arms["targets"]["all linear"][42].work["sft"], arms["quantization"]["NF4, double"][42].work["sft"]]
        assert trained[0] == trained[1]
        merged = [[point.key for point in seeds.values()] for seeds in arms["merge"].values()]
        assert merged[0] == merged[1]
        # what two points have in common: seed 43 trains SFT once for all β, and not what seed 42 has
        one, two, other = beta, arms["beta"]["β 0.5"][42], arms["beta"]["β 0.1"][43]

        def shared(a: experiments.Point, b: experiments.Point) -> list[str]:
            return [stage for stage in a.work if a.work[stage] == b.work[stage]]

        assert {*one.work} - {*shared(one, two)} == {"dpo", "merge", "evaluate@dpo"}
        assert shared(arms["beta"]["β 0.5"][43], other) == shared(two, one)
        assert shared(one, other) == ["base"]  # which alone asks for no seed

    def test_null_and_whole_sections_are_values(self, pipeline: Path, definitions: Callable[[str], Path]) -> None:
        text = BETA.replace("{dpo.beta: 0.3}", "{quantization: null, ingest.sources.0.terms: 23}")
        (definition,) = experiments.load(definitions(text)).values()
        point = experiments.points(pipeline, "beta", definition)["β 0.3"][42]
        assert point.values == {"quantization": None, "ingest.sources.0.terms": 23}
        raw = worktrees.settings(pipeline)
        worktrees.change(raw, point.values)
        assert raw["quantization"] is None
        assert raw["ingest"]["sources"][0]["terms"] == 23


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repo(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = fork(pipeline, tmp_path_factory.mktemp("experiments") / "repo")
    (copy / "experiments.yaml").write_text(BETA)
    for page in (copy / "docs/experiments").glob("beta*"):  # of the default
        page.unlink()
    run("git config user.name t && git config user.email t@example.org", copy)  # `dvc exp save` asks for them
    commit(copy, "experiment")
    return copy


def ran(output: str) -> dict[str, list[str]]:
    """Point → the stages whose command ran."""
    found: dict[str, list[str]] = {}
    for point, stage in re.findall(r"^\[(\S+)\] Running stage '([^']+)'", output, re.MULTILINE):
        found.setdefault(point, []).append(stage)
    return found


def inside(folder: Path) -> list[psutil.Process]:
    """Processes that work below `folder`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd().startswith(f"{folder}/.dvc/tmp/experiments") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            pass
    return found


@pytest.fixture(scope="module")
def killed(repo: Path) -> Path:
    """A call of `beta` that was killed in its first training, after a checkpoint."""
    process = small.start([*COMMAND, "beta"], repo)
    pattern = ".dvc/tmp/experiments/worktrees/*/.checkpoints/dpo-*/checkpoint-*/whole.json"
    try:
        small.until(lambda: any(repo.glob(pattern)) or process.poll() is not None, 300, "no checkpoint")
        assert process.poll() is None, small.finish(process)
    except AssertionError:
        process.kill()
        raise
    process.send_signal(signal.SIGKILL)
    small.finish(process)
    small.until(lambda: not inside(repo), 20, "the training was orphaned")
    return repo


@pytest.fixture(scope="module")
def finished(killed: Path) -> str:
    """What the next call said."""
    return run([*COMMAND, "beta", "--workers", "2"], killed, OMP_NUM_THREADS="1").stdout


class TestRun:
    def test_it_goes_on_and_reuses_every_stage(self, finished: str) -> None:
        stages = ran(finished)
        assert re.search(r"^\[beta-0\.1-42\] resuming from \.checkpoints/dpo-", finished, re.MULTILINE)
        assert stages["beta-0.1-42"] == ["dpo", "merge", "evaluate@dpo"]  # no SFT, no reference
        assert "beta-0.3-42" not in stages  # it is params.yaml as it is
        both = stages["beta-0.1-7"] + stages["beta-0.3-7"]
        assert {len(stages["beta-0.1-7"]), len(stages["beta-0.3-7"])} == {3, 10}  # one waited for the other
        once = {"ingest", "validate", "split", "template", "sft", "pair", "reference"}
        assert sorted(both) == sorted([*once, *["dpo", "merge", "evaluate@dpo"] * 2])

    def test_the_workspace_stays_and_dvc_shows_the_points(self, repo: Path, finished: str) -> None:
        assert run("git status --porcelain", repo).stdout.split() == ["??", "docs/experiments/beta--dpo-train-loss.svg", "??", "docs/experiments/beta.md"]  # fmt: skip
        assert run("git worktree list", repo).stdout.count("\n") == 1
        shown = run("dvc exp show --csv", repo).stdout
        rows = {row["Experiment"]: (row["dpo.beta"], row["seed"]) for row in csv.DictReader(shown.splitlines())}
        points = {f"beta-{beta}-{seed}": (beta, seed) for beta in ("0.1", "0.3") for seed in ("42", "7")}
        assert rows.items() >= points.items()

    def test_the_page_says_what_it_cost(self, repo: Path, finished: str) -> None:
        text = (repo / "docs/experiments/beta.md").read_text()
        assert "**" in text
        assert "2 seeds" in text
        assert (
            "| β 0.1 | `dpo.beta: 0.1`<br>`dpo.max_steps: 16`<br>`dpo.save_strategy: steps`<br>`dpo.save_steps: 1` | 7, 42 |"
            in text
        )
        # β 0.1: the resumed training is no measure of time, but of memory; β 0.3: seed 42 was in the cache
        assert re.search(r"\| dpo: seconds \| [\d.]+ \(n 1\) \| [\d.]+ \(n 1\) \|", text), text
        assert re.search(r"\| dpo: peak memory, GiB \| [\d.]+ \(n 2\) \| [\d.]+ \(n 1\) \|", text), text
        assert "sft: seconds" not in text  # shared by both arms
        svg = ET.parse(repo / "docs/experiments/beta--dpo-train-loss.svg").getroot()
        assert {"β 0.1", "β 0.3"} <= {element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")}

    def test_again_nothing_runs_and_pages_are_the_same(self, repo: Path, finished: str) -> None:
        folder = repo / "docs/experiments"
        before = {path.name: path.read_bytes() for path in folder.glob("beta*")}
        again = run([*COMMAND, "beta"], repo).stdout
        assert ran(again) == {}
        assert before == {path.name: path.read_bytes() for path in folder.glob("beta*")}
        for path in folder.glob("beta*"):
            path.unlink()
        assert run([*COMMAND, "--page-only"], repo).stdout.splitlines()[-1] == "experiments: docs/experiments/beta.md"
        assert before == {path.name: path.read_bytes() for path in folder.glob("beta*")}
        assert re.search(r"^beta\s+2 × 2 runs, 4 recorded", run([*COMMAND, "--list"], repo).stdout, re.MULTILINE)

    def test_a_chosen_point_is_restored(self, repo: Path, finished: str) -> None:
        text = (repo / "params.yaml").read_text()
        (repo / "params.yaml").write_text(text.replace("seed: 42", "seed: 7"))
        try:
            output = run("dvc repro dpo", repo).stdout
        finally:
            (repo / "params.yaml").write_text(text)
            run("dvc repro", repo)
        assert "Running stage" not in output
        assert "Stage 'sft' is cached" in output


def test_hooks_of_dvc_install_and_edits_that_points_do_not_have(tmp_path: Path) -> None:
    """The hook checks out in the new worktree, before that has its cache, and failed; an edit was left out without a word."""
    repo = small.ran(tmp_path / "repo")
    run("dvc install", repo)
    assert worktrees.edited(repo) == ""
    with worktrees.worktree(repo, repo / ".dvc/tmp/points/a", {"slow": 2}) as folder:
        assert (folder / "dvc.lock").is_file()
    (repo / "params.yaml").write_text("slow: 3\n")
    (repo / "data/raw").mkdir(parents=True)
    (repo / "data/raw/법.txt").touch()
    assert worktrees.edited(repo) == "params.yaml, data/raw/"
    assert worktrees.edited(repo, []) == "params.yaml"


@pytest.mark.parametrize("how", ["mv", "cp -a"])
def test_a_point_goes_on_in_a_repository_that_was_moved_or_copied(tmp_path: Path, how: str) -> None:
    """Its worktree names the old place: git finds none there, or works in that of the original."""
    old, new = small.ran(tmp_path / "old"), tmp_path / "new"
    place = ".dvc/tmp/points/a"
    with contextlib.suppress(UserError), worktrees.worktree(old, old / place, {"slow": 2}) as folder:
        (folder / ".checkpoints").mkdir()
        (folder / ".checkpoints/step").write_text("7")
        raise UserError("a stage failed")
    run(f"{how} old new", tmp_path)
    with worktrees.worktree(new, new / place, {"slow": 2}) as folder:
        assert (folder / "params.yaml").read_text() == "slow: 2\n"
        assert (folder / ".checkpoints/step").read_text() == "7"
        common = run("git rev-parse --path-format=absolute --git-common-dir", folder).stdout.strip()
        assert common == str(new / ".git")
    assert not (new / place).exists()
    if how == "cp -a":
        assert run("git rev-parse HEAD", old / place).stdout == run("git rev-parse HEAD", old).stdout


def test_edits_to_all_that_a_point_reads_are_named(tmp_path: Path) -> None:
    run("git init -q && git -c user.name=t -c user.email=t@example.org commit -q --allow-empty -m one", tmp_path)
    for path in ("data/model/own/config.json", "data/harness/own.yaml", "data/raw/a.txt"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
        run(f"git add -N {path}", tmp_path)
    read = {"data/harness/own.yaml", "data/model/own/config.json"}
    assert set(worktrees.edited(tmp_path).split(", ")) == read | {"data/raw/a.txt"}
    assert set(worktrees.edited(tmp_path, []).split(", ")) == read


def test_a_relative_remote_is_the_same_place_from_a_worktree(tmp_path: Path) -> None:
    repo = small.make(tmp_path / "repo")
    run("dvc remote add -q -d store ../store && dvc remote modify -q --local store verify true && git add -A", repo)
    run("git -c user.name=t -c user.email=t@example.org commit -qm remote", repo)
    with worktrees.worktree(repo, repo / ".dvc/tmp/points/a", {"slow": 2}) as folder:
        listed = {place: run("dvc remote list", place).stdout.split() for place in (repo, folder)}
        assert listed[folder] == listed[repo] == ["store", str(tmp_path / "store"), "(default)"]
        assert "verify = true" in (folder / ".dvc/config.local").read_text()
        assert (folder / ".dvc/config.local").stat().st_mode & 0o077 == 0


def test_a_mistake_is_one_line_and_nothing_runs(pipeline: Path, tmp_path: Path) -> None:
    copy = fork(pipeline, tmp_path / "repo")
    (copy / "experiments.yaml").write_text(BETA.replace("dpo.beta: 0.3", "dpo.beta: 0"))
    done = run([*COMMAND], copy, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["experiments: beta.arms.β 0.3: dpo.beta: expected a number > 0, found 0"]
    (copy / "experiments.yaml").write_text(BETA)
    done = run([*COMMAND, "--page-only"], copy, check=False)
    assert done.stdout.splitlines() == ["experiments: beta: nothing is recorded on this machine; run `python -m flows.experiments beta`"]  # fmt: skip
    assert not (copy / ".dvc/tmp/experiments").exists()


# --- verdicts on made-up results --------------------------------------------------------------------------------------


def made_up(recall: float, kindness: float, loss: float, *, seed: int = 0, n: int = 60, inputs: str = "a") -> Run:
    """An evaluation of `n` items, whose scores are `recall` and `kindness` with some scatter that items share between arms."""
    scatter = [((i * 7 + seed * 3) % 11 - 5) / 100 for i in range(n)]
    items = [
        {"id": f"{i:02}", "set": "trained", "task": "definition", "recall": recall + s, "kindness": kindness - s}
        for i, s in enumerate(scatter)
    ]
    mean = sum(scatter) / n
    return Run(
        figures={RECALL: recall + mean, KINDNESS: kindness - mean, LOSS: loss},
        curves={"data/dpo/plots/metrics/train/loss.tsv": [(5, 2 * loss), (10, loss)]},
        items={"data/evaluate/dpo.json": items},
        costs={"sft": Cost("s", 300.0, 2**30, True), "dpo": Cost(f"{inputs}{seed}", 100.0 + seed, 2**30, True)},
    )


def wobble(seed: int) -> float:
    return (0.01, -0.01, 0.002)[seed % 3]


def runs(seeds: int, gain: float, kinder: float = 0.0, loss: float = 0.5) -> dict[str, dict[int, Run]]:
    """Two arms, of which the second has `gain` more recall; seeds differ by a hundredth."""
    return {
        "old": {s: made_up(0.5 + wobble(s), 0.5 + wobble(s + 1), 0.5 + wobble(s), seed=s) for s in range(seeds)},
        "new": {
            s: made_up(0.5 + gain + wobble(s + 1), 0.5 + kinder + wobble(s + 2), loss + wobble(s + 2), seed=s, inputs="b")
            for s in range(seeds)
        },
    }  # fmt: skip


def said(given: dict[str, dict[int, Run]]) -> tuple[str, dict[str, str]]:
    """The verdict, and figure → call of the last arm."""
    shown = findings.with_memory(given)
    found = {label: findings.judge(shown, label) for label in list(shown)[1:]}
    return findings.verdict(shown, found), {f.metric: f.call for f in found[list(shown)[-1]]}


def test_the_interval_is_students() -> None:
    """0.2 ± t(0.975, 2) · 0.1 / √3, with t 4.3027."""
    found = findings._finding("data/x/metrics.json:loss_last", [0.0] * 3, [0.1, 0.2, 0.3], None)
    assert (found.low, found.high) == (pytest.approx(-0.048414, abs=1e-6), pytest.approx(0.448414, abs=1e-6))
    assert found.call == "no different"
    assert findings._finding("data/x/metrics.json:loss_last", [0.0] * 3, [0.15, 0.2, 0.25], None).call == "worse"


class TestVerdict:
    def test_a_planted_difference_is_called_so(self) -> None:
        text, calls = said(runs(3, 0.3, kinder=-0.2, loss=0.2))
        assert calls == {RECALL: "better", KINDNESS: "worse", LOSS: "better", "dpo: peak memory, GiB": "no different"}
        assert text.startswith("Against old, new is better at ")
        assert "reference's words in its answer, trained terms (0.50 → 0.80)" in text
        assert "worse at kindness (classifier, 0–1) (0.50 → 0.30)" in text
        assert "where 3 seeds agree on it" in text
        assert text.count(". ") == 1  # two sentences

    def test_equal_arms_are_no_different(self) -> None:
        text, calls = said(runs(3, 0.0))
        assert set(calls.values()) == {"no different"}
        assert text.startswith("No difference beyond the noise of 3 seeds between old and new.")

    def test_a_difference_within_the_noise_of_seeds_is_none(self) -> None:
        """The items of all seeds together say that it is one; the seeds do not agree."""
        given = runs(3, 0.0)
        for seed, gain in enumerate((0.2, -0.05, 0.03)):
            given["new"][seed] = made_up(0.5 + gain, 0.5, 0.5, seed=seed, inputs="b")
        shown = findings.with_memory(given)
        (found,) = [f for f in findings.judge(shown, "new") if f.metric == RECALL]
        assert found.paired is not None
        assert found.paired.call == "better"
        assert found.call == "no different"

    def test_seeds_that_agree_on_what_the_items_do_not_are_no_difference(self) -> None:
        given = runs(3, 0.0)
        for seed in range(3):  # four items, one of which moved
            for label, gain in (("old", 0.0), ("new", 0.4)):
                made = made_up(0.5, 0.5, 0.5, seed=seed, n=4)
                made.items["data/evaluate/dpo.json"][0]["recall"] += gain
                made.figures[RECALL] = sum(i["recall"] for i in made.items["data/evaluate/dpo.json"]) / 4
                given[label][seed] = made
        (found,) = [f for f in findings.judge(given, "new") if f.metric == RECALL]
        assert found.low is not None
        assert found.low > 0
        assert found.call == "no different"

    def test_one_seed_says_that_the_noise_is_unknown(self) -> None:
        text, calls = said(runs(1, 0.3))
        assert calls[RECALL] == "better"  # the items alone
        assert calls[LOSS] == "unknown"
        assert "With one seed only, how far another seed would move these figures is unknown." in text
        assert "seeds agree" not in text
        equal, _ = said({label: {0: made_up(0.5, 0.5, 0.5)} for label in ("old", "new")})
        assert equal.startswith("No difference beyond chance on the items asked between old and new.")

    def test_memory_is_a_figure_where_trainings_differ(self) -> None:
        given = runs(3, 0.0)
        for seed, made in given["new"].items():
            made.costs["dpo"] = Cost(f"b{seed}", 100.0, 2**29 + seed * 2**10, True)
        text, calls = said(given)
        assert calls["dpo: peak memory, GiB"] == "better"
        assert "better at dpo: peak memory, GiB (1.00 → 0.500)" in text
        assert findings.own(given) == ["dpo"]


class TestPage:
    def test_holds_question_arms_figures_and_cost(self) -> None:
        arms = {"old": {"quantization": None}, "new": {"lora.target_modules": ["q", "v"], "sft.bf16": True}}
        given = runs(2, 0.3)
        given["old"][0].costs["dpo"] = Cost("a0", None, None, False)  # never ran here
        written = findings.page("x", "Which one?", arms, [0, 1, 2], given)
        assert set(written) == {"x.md", "x--dpo-train-loss.svg"}
        text = written["x.md"]
        assert text == findings.page("x", "Which one?", arms, [0, 1, 2], given)["x.md"]
        assert "\n\nWhich one?\n\n**Against old, new is better at" in text
        assert "Not run yet, and not in any figure here: old with seed 2, new with seed 2." in text
        assert "| new | `lora.target_modules: ['q', 'v']`<br>`sft.bf16: true` | 0, 1 |" in text
        assert "| old | `quantization: null` | 0, 1 |" in text
        assert "| reference's words in its answer, trained terms | 0.50 [0.49, 0.51] | 0.80 [0.79, 0.80] |" in text
        assert "| dpo: seconds | 101 (n 1) | 100.5 (n 2) |" in text.replace("100 (n 2)", "100.5 (n 2)")
        assert "5 different stage runs are behind these figures" in text  # sft once, dpo four times
        assert "4 of them were timed on this machine: 10 minutes in all." in text
        assert "The others came from the cache" in text

    def test_drawings_are_files_of_their_own(self) -> None:
        svg = findings.page("x", "?", {"old": {}, "new": {}}, [0, 1, 2], runs(3, 0.3))["x--dpo-train-loss.svg"]
        tree = ET.fromstring(svg)
        used = set(re.findall(r"var\((--[\w-]+)\)", svg))
        style = tree.find("{http://www.w3.org/2000/svg}style")
        assert style is not None
        assert style.text is not None
        light, dark = style.text.split("@media")
        assert used == {"--soft", "--line", "--arm-0", "--arm-1"}
        assert all(f"{name}:#" in light and f"{name}:#" in dark for name in used)
        assert not re.search(r"20\d\d-\d\d", svg)
        legend = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
        assert legend.count("old") == legend.count("new") == 1  # one entry, however many seeds
        assert len(svg) < 60_000

    def test_two_figures_of_one_run_are_two_arms(self, tmp_path: Path) -> None:
        text = textwrap.dedent("""\
            merge:
              question: Which one?
              arms: {a: {}, b: {}}
              seeds: [1]
              targets: [merge]
              metrics: ["m.json:candidates.{arm}.kl"]
            """)
        (tmp_path / "experiments.yaml").write_text(text)
        (definition,) = experiments.load(tmp_path / "experiments.yaml").values()
        kept = tmp_path / "kept"
        kept.mkdir()
        (kept / "m.json").write_text('{"candidates": {"a": {"kl": 0.3}, "b": {"kl": 0.1}}}')
        (kept / "dvc.lock").write_text("stages: {}\n")
        read = {label: experiments._read(tmp_path, kept, label, definition, []) for label in ("a", "b")}
        assert [made.figures for made in read.values()] == [
            {"m.json:candidates.kl": 0.3},
            {"m.json:candidates.kl": 0.1},
        ]
        wrong = definition.model_copy(update={"metrics": ["m.json:candidates.{arm}.k"]})
        with pytest.raises(UserError, match=r"no figure `candidates.a.k`, did you mean `candidates.a.kl`"):
            experiments._read(tmp_path, kept, "a", wrong, [])
