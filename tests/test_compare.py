"""compare: planted differences are found, planted equality is not called one; by scores made by hand and by real models."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from flows import gate
from tasks import compare, evaluate, models, records, render
from tasks.params import Evaluate, Gate, Limit, Template, UserError
from tests.conftest import ROOT
from tests.test_report import Items, answers, made, write_inputs


def called(before: Items, after: Items) -> dict[str, str]:
    return {d.measure.key: d.call for d in compare.compare(before, after, resamples=300)}


class TestPart:
    def test_one_row_does_not_stand_for_thirty(self) -> None:
        assert compare.part(("trained", "unseen"), ["trained"] + ["unseen"] * 30) == "unseen"
        assert compare.part(("trained", "unseen"), ["trained"] * 10 + ["unseen"] * 30) == "trained"
        assert compare.part(("trained", "unseen"), ["trained"] * 3 + ["unseen"] * 2) == "trained"
        assert compare.part(("trained", "unseen"), ["general"]) == ""

    def test_figures_are_of_that_part(self) -> None:
        items = [
            {"id": f"{i}", "set": "unseen" if i else "trained", "task": "answer", "kindness": 0.5} for i in range(31)
        ]
        kindness = next(m for m in compare.MEASURES if m.key == "manner.kindness")
        assert len(compare.of(kindness, items)) == 30


class TestCompare:
    def test_kindness_of_two_languages_is_not_compared(self) -> None:
        sft = [i | ({"korean": 0.0} if "kindness" in i else {}) for i in answers("sft")]
        dpo = [i | ({"korean": 1.0} if "kindness" in i else {}) for i in answers("dpo")]
        assert "manner.kindness" in called(sft, sft)
        assert "manner.kindness" not in called(sft, dpo)

    def test_the_same_model_is_no_different(self) -> None:
        sft = answers("sft")
        assert set(called(sft, sft).values()) == {"no different"}
        # nor when it is only computed in another order
        shaken = [item | ({"nll": item["nll"] + 1e-6} if "nll" in item else {}) for item in sft]
        assert set(called(sft, shaken[::-1]).values()) == {"no different"}

    def test_an_equally_good_model_is_no_different(self) -> None:
        assert set(called(answers("sft"), answers("sft", seed=1)).values()) == {"no different"}

    @pytest.mark.parametrize("field", ["correct", "recall"])
    def test_five_wordings_of_a_term_are_one_term(self, field: str) -> None:
        """Two of twelve concepts got right is no evidence, however often each is asked about."""

        def side(right: int, each: int, concepts: bool) -> Items:
            return [
                {"id": f"{concept}-{n}", "set": "trained", "task": "definition", field: float(concept < right)}
                | ({"concept": f"c{concept}"} if concepts else {})
                for concept in range(12)
                for n in range(each)
            ]

        def found(each: int, concepts: bool, right: int = 2) -> compare.Difference:
            both = side(0, each, concepts), side(right, each, concepts)
            return compare.compare(
                *both, [m for m in compare.MEASURES if m.field == field and m.parts == ("trained",)][:1]
            )[0]

        together, apart, once = found(5, True), found(5, False), found(1, True)
        assert apart.call == "better"
        assert together.call == "no different"
        assert together.n == apart.n == 60
        assert together.p == pytest.approx(once.p, abs=0.35)
        assert together.p > 0.1
        assert together.high - together.low > 1.5 * (apart.high - apart.low)
        assert found(5, True, right=10).call == "better"

    def test_a_better_model_is_better_and_the_reverse_is_worse(self) -> None:
        up, down = called(answers("base"), answers("sft")), called(answers("sft"), answers("base"))
        for key in ("knowledge.trained.definition", "answers.trained.recall", "answers.trained.perplexity"):
            assert (up[key], down[key]) == ("better", "worse")
        assert up["knowledge.unseen.definition"] == down["knowledge.unseen.definition"] == "no different"
        assert up["manner.kindness"] == "worse"
        assert up["form.characters"] == "changed"

    def test_wrong_refusals_are_worse_and_right_ones_better(self) -> None:
        sft, refuses = answers("sft"), answers("sft")
        for item in refuses:
            if "declined" in item:
                item["declined"] = 1.0
        found = called(sft, refuses)
        assert (found["honesty.invented_declined"], found["honesty.trained_declined"]) == ("better", "worse")
        assert found["honesty.unseen_declined"] == "changed"

    def test_figures_are_those_of_scipy(self) -> None:
        base, sft = answers("base"), answers("sft")
        found = {d.measure.key: d for d in compare.compare(base, sft, resamples=300)}
        pairs = [(a, b) for a, b in zip(base, sft, strict=True) if a["set"] == "trained"]
        wins = [b["correct"] - a["correct"] for a, b in pairs if a["task"] == "definition"]
        knowledge = found["knowledge.trained.definition"]
        assert (knowledge.up, knowledge.down) == (wins.count(1), wins.count(-1))
        assert knowledge.p == pytest.approx(stats.binomtest(wins.count(1), wins.count(1) + wins.count(-1)).pvalue)
        assert knowledge.difference == pytest.approx(sum(wins) / 60)
        rates = [
            sum(side["correct"] for side in sides if side["task"] == "definition") / 60
            for sides in zip(*pairs, strict=True)
        ]
        assert knowledge.effect == pytest.approx(
            2 * math.asin(math.sqrt(rates[1])) - 2 * math.asin(math.sqrt(rates[0]))
        )
        assert knowledge.size == "large"
        recall = found["answers.trained.recall"]
        gains = [b["recall"] - a["recall"] for a, b in pairs if "recall" in a]
        assert recall.difference == pytest.approx(sum(gains) / len(gains), abs=1e-4)
        assert recall.low < recall.difference < recall.high
        assert recall.effect > 0.9
        assert all(d.p_holm >= d.p for d in found.values())
        assert sum(d.p_holm > d.p for d in found.values()) > 3

    def test_holm_takes_back_what_chance_gives(self) -> None:
        """Seven items won and none lost are a difference when tested alone (p 1/64), and none among four tests."""
        before = [
            {"id": f"{n:02}", "set": "trained", "task": "definition", "correct": float(n >= 7)} for n in range(20)
        ]
        after = [item | {"correct": 1.0} for item in before]
        measure = next(m for m in compare.MEASURES if m.key == "knowledge.trained.definition")
        (alone,) = compare.compare(before, after, [measure])
        many = compare.compare(before, after, [measure] * 4)
        assert (alone.p, alone.p_holm, alone.call) == (1 / 64, 1 / 64, "better")
        assert {(d.p, d.p_holm, d.call) for d in many} == {(1 / 64, 1 / 16, "no different")}

    def test_ranks_and_mean_must_agree(self) -> None:
        """Most items a little up, a few far down: the ranks say up, the mean does not, and no difference is called."""
        before = [{"id": f"{n:03}", "set": "trained", "task": "definition", "recall": 0.9} for n in range(60)]
        after = [item | {"recall": 0.0 if n < 6 else 0.98} for n, item in enumerate(before)]
        measure = next(m for m in compare.MEASURES if m.key == "answers.trained.recall")
        (found,) = compare.compare(before, after, [measure])
        assert (found.p < 0.001, found.low < 0 < found.high, found.effect > 0) == (True, True, True)
        assert found.call == "no different"

    def test_ranks_that_speak_for_the_other_side(self) -> None:
        """Most items a little down, some far up: the mean is surely up, and so is no rank."""
        before = [{"id": f"{n:03}", "set": "trained", "task": "definition", "recall": 0.15} for n in range(97)]
        after = [item | {"recall": 0.9 + n / 1000 if n < 19 else 0.05 + n / 10000} for n, item in enumerate(before)]
        measure = next(m for m in compare.MEASURES if m.key == "answers.trained.recall")
        (found,) = compare.compare(before, after, [measure])
        assert (found.p < 0.05, found.low > 0, found.effect < 0) == (True, True, True)
        assert found.call == "no different"

    def test_one_item_and_no_item(self) -> None:
        one = [{"id": "a", "set": "trained", "task": "definition", "correct": 0.0, "recall": 0.1}]
        assert {d.call for d in compare.compare(one, [one[0] | {"correct": 1.0, "recall": 0.9}])} == {"no different"}
        assert compare.compare([], []) == []

    def test_different_items_are_refused(self) -> None:
        with pytest.raises(UserError, match="different items"):
            compare.compare([{"id": "a", "set": "trained"}], [{"id": "b", "set": "trained"}])


class TestFloor:
    """The noise of decoding: what a difference must exceed."""

    @staticmethod
    def sides(noise: float) -> tuple[Items, Items]:
        """100 items whose recall rises by 0.02 each; ten of them were sampled with several seeds."""
        before = [{"id": f"{n:03}", "set": "trained", "task": "definition", "recall": n / 200} for n in range(100)]
        for item in before[:10]:
            item["noise"] = {"recall": noise}
        return before, [item | {"recall": item["recall"] + 0.02 + n % 3 / 1000} for n, item in enumerate(before)]

    def test_is_the_repeatability_limit(self) -> None:
        """Of two decodings of one model, the difference of means is below the floor 19 times in 20."""
        rng = random.Random(0)
        items = [
            {"id": str(n), "set": "trained", "task": "definition", "recall": 0.5, "noise": {"recall": 0.09}}
            for n in range(50)
        ]
        floor = compare.floor("recall", items, items)
        assert floor == pytest.approx(1.96 * math.sqrt(2 * 0.09 / 50))
        draws = [
            sum(rng.gauss(0, 0.3) for _ in range(50)) / 50 - sum(rng.gauss(0, 0.3) for _ in range(50)) / 50
            for _ in range(2000)
        ]
        assert sum(abs(d) < floor for d in draws) / 2000 == pytest.approx(0.95, abs=0.015)

    def test_no_difference_below_it(self) -> None:
        for noise, call, drowned in ((0.0001, "better", False), (0.01, "no different", True)):
            (found,) = compare.compare(*self.sides(noise))
            assert found.p < 0.001
            assert found.low > 0
            assert (found.call, found.drowned) == (call, drowned)

    def test_the_gate_calls_it_none_either(self) -> None:
        params = Gate(bootstrap=500, limits={"trained.definition.recall": Limit(margin=0.01)})
        for noise, reason in ((0.0001, "better"), (0.01, "not worse, below the noise of decoding")):
            before, after = self.sides(noise)
            verdict = gate.decide(before, after, [], params)
            assert (verdict.promoted, verdict.rows[0].reason) == (True, reason)
            back = gate.decide(after, before, [], params)
            assert not back.promoted  # the margin holds whatever the noise
            assert ("may be worse" in back.rows[0].reason) == (noise == 0.01)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Two equal models that differ in 10 % of 97 items each way: the 95 % interval misses 0 in about 5 % of draws."""
    rng = random.Random(0)
    missed = 0
    for _ in range(200):
        differences = [rng.choice([-1.0, 1.0]) if rng.random() < 0.2 else 0.0 for _ in range(97)]
        low, high = compare.bootstrap(differences, resamples=400, seed=0)
        missed += not low <= 0 <= high
    assert missed <= 20


def test_an_item_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "dpo.answers.jsonl"
    for text, said in (('{"id": "a"', ":1: expected a JSON object"), ('{"id": "a"}', ":1: expected an object with id, set and task"),
                       ('{"id": "a", "set": "s", "task": "t"}\n' * 2, ":2: the id 'a' comes twice")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            compare.read(path)
    path.write_text(json.dumps({"id": "a", "set": "s", "task": "t", "answer": "one\u2028two"}, ensure_ascii=False))
    assert compare.read(path)[0]["answer"] == "one\u2028two"


def test_no_torch_and_no_scipy_before_it_is_needed() -> None:
    code = "import sys, tasks.compare; sys.exit(bool({'torch', 'scipy', 'statsmodels'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- real models, through the stages -----------------------------------------------------------------------------------

TERMS = 40


def _rows() -> list[dict[str, Any]]:
    rng = random.Random(3)
    words = ["short", "thumb", "usual", "report", "eye", "back", "heart", "bone", "word", "term", "kyphosis", "doctor"]
    rows = []
    for n in range(TERMS):
        turns = [
            {"role": "user", "content": f"What is {rng.choice(words)} {n}?"},
            {"role": "assistant", "content": f"A {' '.join(rng.sample(words, 3))}."},
        ]
        rows.append(
            {"kind": "chat", "source": "s", "line": n + 1, "license": "l", "concept": f"c{n}", "topic": "t", "task": "definition",
             "wording": "test", "term": f"thing {n}", "lay": None, "messages": turns}
        )  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def folder(tiny: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`test.parquet`; `taught`, the tiny model after learning its answers by heart; `random`, a random adapter for it."""
    import polars as pl

    where = tmp_path_factory.mktemp("models")
    rows = _rows()
    records.write(records.frame(rows).with_columns(set=pl.lit("trained")), where / "test.parquet")
    models.seed_everything(0)
    model = models.load(tiny, None).float().requires_grad_().train()
    encoded = [render.encode(tokenizer, row["messages"], None) for row in rows]
    ids = models.pad([a for a, _ in encoded], 0)
    labels = models.pad([b for _, b in encoded], render.IGNORED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.3
    model.to(torch.bfloat16).save_pretrained(where / "taught")
    tokenizer.save_pretrained(where / "taught")
    adapted = models.new_adapter(models.load(where / "taught", None), {"r": 8, "lora_alpha": 16}, seed=1)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data = 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    models.save_adapter(adapted, where / "random")
    return where


def _judged(
    folder: Path, tmp_path: Path, **subjects: str
) -> tuple[str, str, list[compare.Difference], list[compare.Difference]]:
    """(summary, page, base against sft, sft against dpo) of the report on these models, as `evaluate` finds them."""
    data = write_inputs(tmp_path / "data", curves=False)
    params = Evaluate(batch_size=40, max_new_tokens=12, bootstrap=200, reworded=4, noise_items=4,
                      metrics=["tasks/metrics/overlap", "tasks/metrics/manner", "tasks/metrics/form"])  # fmt: skip
    for name, subject in subjects.items():
        evaluate.run(
            folder / "test.parquet", folder / "taught", folder / subject, folder / "taught", Path("data/harness"),
            data / f"evaluate/{name}.json", data / f"evaluate/{name}.answers.jsonl",
            params=params, template=Template(), generation={}, quantization=None, seed=1,
        )  # fmt: skip
    items = {name: compare.read(data / f"evaluate/{name}.answers.jsonl") for name in subjects}
    summary, page, _ = made(data)
    return summary, page, compare.compare(items["base"], items["sft"]), compare.compare(items["sft"], items["dpo"])


def test_a_random_adapter_is_worse_and_the_same_model_no_different(folder: Path, tmp_path: Path) -> None:
    summary, page, same, broken = _judged(folder, tmp_path, base="taught", sft="taught", dpo="random")
    assert len(same) > 10
    assert {d.call for d in same} == {"no different"}
    assert all(d.same for d in same)
    found = {d.measure.key: d for d in broken}
    assert found["knowledge.trained.definition"].before > 0.9
    for key in (
        "knowledge.trained.definition",
        "answers.trained.recall",
        "answers.trained.rouge_l",
        "answers.trained.perplexity",
    ):
        assert (found[key].call, found[key].size) == ("worse", "large"), key
    # babble may sound kind, which does not make up for it
    assert {key for key, d in found.items() if d.call == "better"} <= {
        "manner.kindness",
        "manner.kindness_apart",
        "manner.valence",
    }
    assert summary.startswith("Worse: ")
    assert '<p class="word">Worse</p>' in page
    assert "it is worse at choosing the right definition of trained terms" in page
    champion, challenger = (compare.read(tmp_path / f"data/evaluate/{name}.answers.jsonl") for name in ("sft", "dpo"))
    limits = Gate(bootstrap=500, limits={"trained.definition.correct": Limit(margin=0.05)})
    assert not gate.decide(champion, challenger, [], limits).promoted
    assert gate.decide(champion, champion, [], limits).rows[0].reason == "no different, item by item"
