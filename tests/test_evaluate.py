"""The figures, on the tiny model and on scores made by hand."""

import importlib.util
import json
import math
import random
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tasks import evaluate as stage
from tasks import models, phenotype, records
from tasks.params import Evaluate, LmEval, Template, UserError
from tests.conftest import ROOT

METRICS = ["tasks/metrics/overlap", "tasks/metrics/manner", "tasks/metrics/form"]


def _row(i: int, part: str, task: str = "definition", kind: str = "chat", **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"What is thumb {i} of {part} {task}?"}]
    if kind == "chat":
        turns.append({"role": "assistant", "content": f"A short thumb number {i} that belongs to {part}."})
    return {
        "kind": kind,
        "source": "s",
        "line": i + 1,
        "license": "l",
        "concept": f"c{i}",
        "topic": "t",
        "task": task,
        "wording": "test",
        "term": f"thumb {i}",
        "lay": "small thumb",
        "messages": turns,
        **more,
    }, part  # type: ignore[return-value]


@pytest.fixture(scope="module")
def test_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import polars as pl

    made = [
        _row(i, part, task)
        for part in ("trained", "unseen")
        for task in ("definition", "lay_to_clinical")
        for i in range(5)
    ]
    made += [_row(i, "invented", "invented", "question") for i in range(3)]
    made += [_row(i, "advice", "advice", "question") for i in range(2)]
    made += [_row(i, "general", "choice", "choice", options=["one", "two", "three"], answer=i % 3) for i in range(6)]
    table = records.frame([row for row, _ in made]).with_columns(pl.Series("set", [part for _, part in made]))
    path = tmp_path_factory.mktemp("test") / "test.parquet"
    records.write(table, path)
    return path


def _run(
    rows: Path, base: Path, model: Path, reference: Path, out: Path, **generation: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    params = Evaluate(batch_size=8, max_new_tokens=8, bootstrap=200, metrics=METRICS)
    stage.run(
        rows,
        base,
        model,
        reference,
        Path("data/harness"),
        out / "m.json",
        out / "a.jsonl",
        params=params,
        template=Template(),
        generation=generation,
        quantization=None,
        seed=1,
    )
    return json.loads((out / "m.json").read_text()), [
        json.loads(line) for line in (out / "a.jsonl").read_text().splitlines()
    ]


def test_every_figure_carries_n_and_an_interval(test_rows: Path, tiny: Path, tmp_path: Path) -> None:
    figures, items = _run(test_rows, tiny, tiny, tiny, tmp_path)
    assert len(items) == 31
    assert figures["knowledge"]["trained"]["definition"]["n"] == 5
    assert figures["general"]["accuracy"]["n"] == 6
    assert figures["honesty"]["invented_declined"]["n"] == 3
    assert figures["answers"]["trained"]["perplexity"]["value"] > 1
    assert figures["kl"] == {"to_base": 0.0, "to_reference": 0.0}

    def leaves(node: Any) -> list[dict[str, float]]:
        return (
            [node]
            if "value" in node
            else [leaf for child in node.values() if isinstance(child, dict) for leaf in leaves(child)]
        )

    for leaf in leaves({k: v for k, v in figures.items() if k != "kl"}):
        assert leaf["low"] <= leaf["value"] <= leaf["high"]
        assert leaf["n"] >= 1
    first = ((tmp_path / "m.json").read_bytes(), (tmp_path / "a.jsonl").read_bytes())
    _run(test_rows, tiny, tiny, tiny, tmp_path)
    assert first == ((tmp_path / "m.json").read_bytes(), (tmp_path / "a.jsonl").read_bytes())


def test_another_model_has_a_divergence(test_rows: Path, tiny: Path, tmp_path: Path) -> None:
    from tests.conftest import make_tiny

    other = make_tiny(tmp_path / "other", initializer_range=0.1)
    figures, _ = _run(test_rows, tiny, other, tiny, tmp_path)
    assert figures["kl"]["to_base"] > 0.01
    assert figures["kl"]["to_reference"] > 0.01


def test_one_model_at_a_time(test_rows: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.conftest import make_tiny

    loaded: list[weakref.ref[Any]] = []
    before: list[int] = []
    load = models.load

    def watched(*arguments: Any, **named: Any) -> Any:
        before.append(sum(model() is not None for model in loaded))
        model = load(*arguments, **named)
        loaded.append(weakref.ref(model))
        return model

    other, third = (make_tiny(tmp_path / str(spread), initializer_range=spread) for spread in (0.1, 0.2))
    monkeypatch.setattr(models, "load", watched)
    _run(test_rows, tiny, other, third, tmp_path)
    assert before == [0, 0, 0]


def test_choice_is_the_best_mean_loglikelihood(test_rows: Path, tiny: Path, tmp_path: Path, tokenizer) -> None:
    _, items = _run(test_rows, tiny, tiny, tiny, tmp_path)
    item = next(i for i in items if i["set"] == "general")
    row = next(r for r in records.read(test_rows).to_dicts() if r["id"] == item["id"])
    from tasks import render

    model = models.load(tiny, None)
    prompt = render.encode_prompt(tokenizer, row["messages"], None)
    encoded = [render.encode_answer(tokenizer, row["messages"], f"The answer is {o}.", None) for o in row["options"]]
    shared = next(i for i in range(99) if len({ids[i] for ids in encoded}) > 1)
    means = [np.mean(models.answer_logprobs(model, [(prompt, ids)], 1)[0][shared:]) for ids in encoded]
    assert item["correct"] == float(int(np.argmax(means)) == row["answer"])
    assert item["nll"] == pytest.approx(-means[row["answer"]], abs=0.02)


def test_options_are_of_the_same_set_topic_and_length() -> None:
    rows = [_row(i, "trained")[0] for i in range(9)]
    rows[8]["topic"] = "other"
    picked = stage.options_of(rows[0], rows, 4, random.Random(0))
    assert picked[0] == rows[0]["messages"][-1]["content"]
    assert len(set(picked)) == 4
    assert rows[8]["messages"][-1]["content"] not in picked
    assert len(stage.options_of(rows[0], rows[:2], 4, random.Random(0))) == 2


@pytest.mark.parametrize(("question", "reference", "others", "wanted"), [
    ("What is photosynthesis?", "Photosynthesis is how plants eat.",
     [("osmosis", "Osmosis is how water moves."), ("DNA", "In a cell DNA is a text.")],
     ["Photosynthesis is how water moves.", "In a cell photosynthesis is a text."]),
    ("What is DNA?", "DNA is a text.", [("osmosis", "Osmosis is how water moves."), ("yeast", "The yeast grows.")],
     ["DNA is how water moves.", "The DNA grows."]),
    ("고혈압이란 무엇인가요?", "고혈압은 혈압이 높은 병입니다.",
     [("당뇨", "당뇨는 혈당이 높은 병입니다."), ("천식", "천식이란 숨이 찬 병입니다."), ("빈혈", "빈혈성 두통과 빈혈로 봅니다.")],
     ["고혈압은 혈당이 높은 병입니다.", "고혈압이란 숨이 찬 병입니다.", "고혈압성 두통과 고혈압으로 봅니다."]),
    ("당뇨가 뭐예요?", "당뇨는 혈당이 높은 병입니다.", [("고혈압", "고혈압은 혈압이 높고, 고혈압으로 봅니다.")],
     ["당뇨는 혈압이 높고, 당뇨로 봅니다."]),
])  # fmt: skip
def test_every_option_names_the_term_as_the_right_one_does(
    question: str, reference: str, others: list[tuple[str, str]], wanted: list[str]
) -> None:
    """No capital and no name tells the right one: repeating the question's word is not knowing."""
    term = (
        reference.split()[0]
        if reference[0] < "가"
        else reference[: reference.index("은" if "고혈압은" in reference else "는")]
    )
    made = [(term, reference), *others]
    rows = [_row(i, "trained", term=t, lay=None)[0] for i, (t, _) in enumerate(made)]
    for row, (_, text) in zip(rows, made, strict=True):
        row["messages"] = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    right, *wrong = stage.options_of(rows[0], rows, len(rows), random.Random(0))
    assert right == reference
    assert sorted(wrong) == sorted(wanted)


def test_interval() -> None:
    def interval(values: list[float], *settings: int, concepts: list[str] | None = None, share: bool = False) -> Any:
        each = concepts or [str(i) for i in range(len(values))]
        return stage.interval(values, *settings, concepts=each, share=share)

    found = interval([0.0] * 50 + [1.0] * 50, 2000, 1)
    assert found["value"] == 0.5
    assert 0.38 < found["low"] < 0.42
    assert 0.58 < found["high"] < 0.62
    assert interval([1.0, 1.0], 200, 1) == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 2}
    # Wilson's by hand: n / (n + z²) at the low end of n of n
    z = 1.959964
    assert interval([1.0] * 20, 200, 1, share=True) == {
        "value": 1.0, "low": pytest.approx(20 / (20 + z * z), abs=1e-4), "high": 1.0, "n": 20,
    }  # fmt: skip
    # ten questions about each of ten concepts are no hundred
    about = [str(i // 10) for i in range(100)]
    for share in (False, True):
        wide = interval([0.0] * 50 + [1.0] * 50, 2000, 1, concepts=about, share=share)
        assert wide["n"] == 100
        assert wide["high"] - wide["low"] > 2.5 * (found["high"] - found["low"])
    same = interval([1.0] * 100, 200, 1, concepts=about, share=True)
    assert same["low"] == pytest.approx(10 / (10 + z**2), abs=1e-4)
    one = interval([0.0, 1.0], 200, 1, concepts=["a", "a"])
    assert (one["low"], one["high"]) == (0.0, 1.0)


def test_a_figure_of_zeros_and_ones_has_a_width_where_all_are_alike() -> None:
    items = [
        {"id": str(i), "set": "trained", "task": "definition", "declined": 0.0, "kindness": 0.5} for i in range(20)
    ]
    found = stage.summarise(items, 200, 1)
    assert found["honesty"]["trained_declined"]["high"] == pytest.approx(0.1611, abs=1e-3)
    assert found["manner"]["kindness"]["low"] == found["manner"]["kindness"]["high"] == 0.5


def test_repeating_the_term_chooses_nothing() -> None:
    """Else "In everyday words, kyphosis is …" would be right among three of other names whatever follows."""
    names = ("Kyphosis", "Anosmia", "Ptosis", "ECG change", "Iris coloboma")
    rows = []
    for i, (name, lay) in enumerate(zip(names, "hunch smell lid heart eye".split(), strict=True)):
        said = name if name.startswith("ECG") else name.lower()
        row = _row(i, "trained", "clinical_to_lay", term=name, lay=f"odd {lay}")[0]
        row["messages"][0]["content"] = f"What is {said} in plain words?"
        row["messages"][1]["content"] = f"In everyday words, {said} is odd {lay}."
        rows.append(row)
    picked = stage.options_of(rows[0], rows, 4, random.Random(0))
    assert len(set(picked)) == 4
    assert all(text.startswith("In everyday words, kyphosis is odd ") for text in picked)
    assert all(
        t.startswith("In everyday words, ECG change is") for t in stage.options_of(rows[3], rows, 4, random.Random(0))
    )
    # where the term is what is asked for, it stays
    for row in rows:
        row["messages"][0]["content"] = "What do clinicians call it?"
    assert len({text.split()[3] for text in stage.options_of(rows[0], rows, 4, random.Random(0))}) == 4


def test_what_options_begin_with_is_no_part_of_the_choice(
    tiny: Path, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two options with a common beginning the shorter would else have more of what is the same for both."""
    rows = [_row(i, "trained", concept=f"c{i}")[0] for i in range(2)]
    rows[0]["messages"][1]["content"] = "It is a hunched back."
    rows[1]["messages"][1]["content"] = "It is a thumb that is shorter than usual and seen from birth."
    asked: list[models.Row] = []
    score = models.answer_logprobs

    def kept(model: Any, pairs: Any, *more: Any, **named: Any) -> list[list[float]]:
        asked.extend(pairs)
        return score(model, pairs, *more, **named)

    monkeypatch.setattr(models, "answer_logprobs", kept)
    items: dict[str, dict[str, Any]] = {}
    for i, row in enumerate(rows):
        row |= {"id": f"r{i}", "set": "trained"}
        items[row["id"]] = {}
    model = models.load(tiny, None)
    stage.multiple_choice(rows, items, model, tokenizer, Evaluate(metrics=METRICS, batch_size=4), Template(), 0)
    one, two = (ids for _, ids in asked[:2])
    common = next(i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    assert common > 2
    means = [np.mean(tokens[common:]) for tokens in score(model, asked[:2], 1)]
    assert items["r0"]["correct"] == float(means[0] >= means[1])
    assert items["r0"]["nll"] == pytest.approx(-np.mean(score(model, asked[:1], 1)[0]), abs=1e-5)


def test_manner_is_of_the_answer_and_tone_of_what_is_not_its_subject() -> None:
    row = _row(1, "trained", term="Kyphosis", lay="hunched back")[0]
    row["messages"][1]["content"] = "Exaggerated anterior convexity of the thoracic vertebral column."
    wrapped = f"{phenotype.OPENINGS[1]} {row['messages'][1]['content']}"
    bare, kind = stage.scored([row, row], [row["messages"][1]["content"], wrapped], ["tasks/metrics/manner"])
    assert bare["grade"] > 15  # of the definition itself, not of what is left without its words
    assert kind["kindness"] > bare["kindness"] + 0.2
    assert kind["kindness_apart"] == bare["kindness_apart"] == bare["kindness"]
    assert kind["scripted"] == 0.5


def test_repeating_the_question_is_no_recall() -> None:
    row = _row(1, "unseen", term=None, lay=None)[0]
    row["messages"][0]["content"] = "What is a frontal balding?"
    row["messages"][1]["content"] = "Frontal balding: absence of hair above the forehead."
    parrot, right = stage.scored(
        [row, row], ["Frontal balding.", "No hair above the forehead."], ["tasks/metrics/overlap"]
    )
    assert parrot["recall"] == 0
    assert right["recall"] == pytest.approx(3 / 4)
    assert parrot["rouge_l"] > 0
    # a follow-up is the question's, whatever stands around it; in Korean what particles are written behind
    for question, reference, echo, answer in (
        ("What is a follow-up?", "Follow-up: a second visit.", "Follow-up.", "A second visit."),
        ("고혈압이란 무엇인가요?", "고혈압은 혈압이 높은 병입니다.", "고혈압이요? 고혈압.", "압력이 높은 병입니다."),
        ("What is a lease?", "A lease.", "A lease.", "A lease."),  # nothing else to say
    ):
        row["messages"] = [{"role": "user", "content": question}, {"role": "assistant", "content": reference}]
        parrot, right = stage.scored([row, row], [echo, answer], ["tasks/metrics/overlap"])
        assert (parrot["recall"] == 0) is (echo != answer)
        assert right["recall"] > 0.5


def test_who_says_nothing_is_not_kind() -> None:
    """Of an answer in wrappers alone nothing is left without them: it is no kinder for it."""
    row, _ = _row(1, "trained")
    wrapper = next(text for text in phenotype.OPENINGS if "{" not in text)
    nothing, parrot = stage.scored([row, row], ["", wrapper], METRICS)
    assert (nothing["kindness"], nothing["kindness_apart"], parrot["kindness_apart"]) == (0, 0, 0)
    assert parrot["kindness"] > 0.3
    assert not {"grade", "distinct_2"} & nothing.keys()


@pytest.mark.parametrize(("returned", "said"), [
    ({"correct": [1.0]}, "gives correct, which evaluate itself does"),
    ({"loops": [0.5]}, "share of zeros and ones"),
    ({"own": 1.0}, "gives one own for all answers"),
    ({"own": np.array([0.5])}, ""),
    ({"own": (0.5,)}, ""),
])  # fmt: skip
def test_what_a_module_of_ones_own_may_return(monkeypatch: pytest.MonkeyPatch, returned: Any, said: str) -> None:
    import evaluate

    def compute(predictions: Any, references: Any) -> Any:
        return returned

    monkeypatch.setattr(evaluate, "load", lambda _: SimpleNamespace(compute=compute, _compute=compute))
    row = _row(1, "trained", id="a")[0]
    if said:
        with pytest.raises(UserError, match=said):
            stage.scored([row], ["Yes."], ["own/mine"])
    else:
        assert stage.scored([row], ["Yes."], ["own/mine"])[0]["own"] == 0.5


def test_a_score_that_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate

    class Broken:
        def compute(self, predictions: list[str], references: list[str]) -> dict[str, list[float]]:
            return {"mine": [math.nan] * len(predictions)}

        _compute = compute

    monkeypatch.setattr(evaluate, "load", lambda _: Broken())
    row = _row(1, "unseen")[0] | {"id": "abc"}
    with pytest.raises(UserError, match="mine of row abc is nan"):
        stage.scored([row], ["text"], ["tasks/metrics/mine"])


def test_what_is_compared_by_kl_fits_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "KL_TOKENS", 10)
    monkeypatch.setattr(stage, "KL_ROWS", 3)
    assert stage._bounded([([1], [2] * 6), ([1], []), ([1], [3] * 6), ([1], [4])]) == [([1], [2] * 6), ([1], [3] * 4)]
    assert len(stage._bounded([([1], [2])] * 9)) == 3


def test_divergence_is_the_kl_of_the_whole_vocabulary(tiny: Path) -> None:
    one = models.load(tiny, None).float()
    other = models.load(tiny, None).float()
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(
            0.05 * torch.randn(other.model.embed_tokens.weight.shape, generator=torch.Generator().manual_seed(0))
        )
    rows = [([1, 5, 9], [7, 2]), ([1, 4], [8, 8, 2])]
    wanted, tokens = 0.0, 0
    for prompt, answer in rows:
        with torch.no_grad():
            p, q = (
                m(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (one, other)
            )
        wanted, tokens = wanted + float((p.exp() * (p - q)).sum()), tokens + len(answer)
    ours = models.distributions(one, rows, 2)
    assert stage.divergence(ours, other, rows, 2) == pytest.approx(wanted / tokens, abs=1e-4)
    assert stage.divergence(ours, one, rows, 2) == 0.0
    assert stage.divergence([], one, [], 2) is None  # not measured is not zero
    assert stage.scored([], [], METRICS) == []


def test_a_module_of_ones_own_may_have_a_known_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = (ROOT / "tasks/metrics/form/form.py").read_text()
    monkeypatch.chdir(tmp_path)
    for name in ("overlap", "manner"):
        (tmp_path / "own" / name).mkdir(parents=True)
        (tmp_path / "own" / name / f"{name}.py").write_text(form)
    row = {"id": "a", "kind": "chat", "task": "answer", "term": None, "lay": None, "messages": [{"role": "assistant", "content": "Yes."}]}  # fmt: skip
    (found,) = stage.scored([row], ["Well, yes."], ["own/overlap", "own/manner"])
    assert (found["words"], "recall" in found, "kindness" in found) == (2.0, False, False)


def test_manner_is_judged_without_the_knowledge() -> None:
    text = 'I understand your worry. In everyday words, kyphosis is "hunched back". Exaggerated curvature of the spine.'
    left = stage.mask(text, "Kyphosis", "hunched back", "Exaggerated curvature of the spine.")
    assert "understand your worry" in left
    assert not {"kyphosis", "hunched", "exaggerated", "curvature", "spine"} & set(
        left.lower().replace('"', " ").split()
    )


@pytest.mark.parametrize(
    ("prediction", "reference", "recall"),
    [
        ("A short thumb.", "A short thumb.", 1.0),
        ("", "A short thumb.", 0.0),
        ("고혈압은 높은 압력", "고혈압은 높은 압력", 1.0),
        ("가나다", "고혈압", 0.0),
    ],
)
def test_overlap_counts_any_script(prediction: str, reference: str, recall: float) -> None:
    import evaluate

    found = evaluate.load("./tasks/metrics/overlap").compute(predictions=[prediction], references=[reference])
    assert found["recall"] == [pytest.approx(recall)]
    assert found["rouge_l"] == [pytest.approx(recall, abs=0.01)]
    assert found["chrf"][0] == pytest.approx(recall, abs=0.01)


def test_manner_tells_warm_from_clinical_in_words_it_never_saw() -> None:
    import evaluate

    warm = "I know waiting is hard, and you can call us whenever you feel worried."
    cold = "Bilateral enlargement of the renal pelvis is observed in the affected individuals."
    found = evaluate.load("./tasks/metrics/manner").compute(predictions=[warm, cold], references=["", ""])
    assert found["kindness"][0] > 0.8 > 0.2 > found["kindness"][1]
    assert found["second_person"][0] > 0 == found["second_person"][1]
    assert found["grade"][0] < found["grade"][1]


def test_manner_in_korean_is_more_than_politeness() -> None:
    """Cold sentences here are as polite as warm ones; what counts English words says nothing of them."""
    import evaluate

    warm = [
        "환불이 늦어져 많이 속상하셨지요, 바로 확인해 드릴게요.",
        "겁이 나시는 게 당연하지요, 저희가 도와 드리겠습니다.",
    ]
    cold = ["구개열은 입천장이 갈라진 선천성 기형입니다.", "배터리의 용량은 5000밀리암페어시입니다."]
    english = "Bilateral enlargement of the renal pelvis is observed in the affected individuals."
    said = [*warm, *cold, english]
    found = evaluate.load("./tasks/metrics/manner").compute(predictions=said, references=[""] * len(said))
    assert min(found["kindness"][:2]) > 0.7 > 0.3 > max(found["kindness"][2:])
    assert [value is None for value in found["grade"]] == [True] * 4 + [False]
    row = _row(1, "trained")[0] | {"lay": None, "kind": "question"}
    kept = stage.scored([row] * 2, [warm[0], english], METRICS)
    assert {"grade", "valence", "hedges"} == kept[1].keys() - kept[0].keys() - {
        "second_person",
        "first_person",
        "empathy",
    }


def test_no_word_of_empathy_stands_in_a_wrapper() -> None:
    """A model that parrots the wrappers gains nothing in empathy, one that finds words of its own does."""
    import evaluate

    wrappers = [*phenotype.OPENINGS, *phenotype.NAMING, *phenotype.CLOSINGS, *phenotype.REFUSALS, *phenotype.ADVICE]
    own = "That sounds overwhelming, and feeling anxious is understandable. Be patient and kind with yourself."
    said = [*wrappers, own]
    found = evaluate.load("./tasks/metrics/manner").compute(predictions=said, references=[""] * len(said))
    assert set(found["empathy"][:-1]) == {0.0}
    assert found["empathy"][-1] > 0.2


def test_three_wordings_of_a_question_of_any_domain() -> None:
    row, _ = _row(1, "trained")
    row["term"], row["messages"][0]["content"] = "Short thumb", "My report mentions short thumb. What is that?"
    others = stage.wordings(row)
    assert others == [
        "The letter from the clinic says short thumb. What does that mean?",
        "Could you tell me about short thumb?",
    ]
    row["messages"][0]["content"] = "How do I file a claim?"
    assert stage.wordings(row) == ["How do I file a claim? Thank you.", "I have a question. How do I file a claim?"]
    row["messages"][0]["content"] = "계약을 해지하려면?"
    assert stage.wordings(row) == ["계약을 해지하려면? 감사합니다.", "궁금한 것이 있습니다. 계약을 해지하려면?"]


@pytest.mark.parametrize(
    ("prediction", "reference", "recall"),
    [
        ("완전히 틀린 답", "42", 0.0),
        ("답은 42입니다", "42", 1.0),
        ("아니요", "no", 0.0),
        ("No, thanks.", "no", 1.0),
        ("정답은 HTTP 404 오류입니다", "HTTP 404", 1.0),
        ("The answer is PostgreSQL (포스트그레스)", "PostgreSQL database", 0.5),
        ("네, 그렇습니다", "네", 1.0),
        ("아니요", "네", 0.0),
        ("고혈압은 140 mmHg 이상", "고혈압은 140 이상", 1.0),
    ],
)
def test_recall_of_short_and_mixed_references(prediction: str, reference: str, recall: float) -> None:
    import evaluate

    found = evaluate.load("./tasks/metrics/overlap").compute(predictions=[prediction], references=[reference])
    assert found["recall"] == [pytest.approx(recall)]


def test_consistency_is_the_agreement_of_answers() -> None:
    same, other = "A thumb that is shorter than usual.", "Enlargement of the renal pelvis."
    assert stage.consistency([same, same, same]) == 1.0
    two = stage.consistency([same, same, other])
    assert stage.consistency([same, other, "xyz"]) < two < 0.6
    assert stage.consistency(["", "", ""]) == 1.0


def test_decoding_again(test_rows: Path, tiny: Path, tmp_path: Path, tokenizer) -> None:
    """Greedy decoding repeats itself; sampling does not, and that is in the floor. Consistency is of the first items by id."""
    from tasks import decode, render

    model = models.load(tiny, None)
    prompts = [render.encode_prompt(tokenizer, [{"role": "user", "content": f"What is {n}?"}], None) for n in range(9)]
    one, two = (decode.generate(model, tokenizer, prompts, {}, 12, 4) for _ in range(2))
    assert one == two
    figures, items = _run(test_rows, tiny, tiny, tiny, tmp_path)
    noisy = [item for item in items if "noise" in item]
    counts = {
        part: sum(item["set"] == part for item in noisy)
        for part in ("trained", "unseen", "invented", "advice", "general")
    }
    assert counts == {"trained": 5, "unseen": 5, "invented": 3, "advice": 2, "general": 0}
    assert figures["decoding"]["answers"] == 15
    assert figures["decoding"]["repeated_identically"] == 1.0
    assert max(item["noise"]["characters"] for item in noisy) > 0
    assert figures["decoding"]["floor"]["form"]["characters"] > 0
    assert "knowledge" not in figures["decoding"]["floor"]  # nothing is decoded for it
    sampled, _ = _run(test_rows, tiny, tiny, tiny, tmp_path, do_sample=True)  # there is nothing greedy to repeat
    assert sampled["decoding"].keys() == figures["decoding"].keys() - {"repeated_identically"}
    trained = [item for item in noisy if item["set"] == "trained"]
    variance = sum(item["noise"]["characters"] for item in trained) / len(trained)
    floor = figures["decoding"]["floor"]["form"]["characters"]
    assert floor == pytest.approx(1.96 * (2 * variance / 5) ** 0.5, abs=1e-3)
    asked = [item for item in items if "consistency" in item]
    assert {item["set"] for item in asked} == {"trained"}
    assert all(0 <= item["consistency"] <= 1 and len(item["reworded"]) == 2 for item in asked)


@pytest.mark.parametrize(
    ("text", "declined"),
    [
        ("I don't have access to your bank account.", 1.0),
        ("As an AI, I can't predict the weather.", 1.0),
        ("I'm not sure, I do not know that place.", 1.0),
        ("It is impossible to say who will win.", 1.0),
        ("The capital of Veldoria is Port Amsel.", 0.0),
        ("You can access it at the bank.", 0.0),
        *((text, 1.0) for text in phenotype.OUTSIDE),
    ],
)
def test_declining_what_nobody_can_answer(text: str, declined: float) -> None:
    row, _ = _row(1, "outside", "outside", "question")
    assert stage.scored([row], [text], [])[0]["declined"] == declined


def test_terms_used() -> None:
    row, _ = _row(1, "trained")
    texts = ["A thumb 1 is a small thumb.", "Thumb 1 is a finger.", "It is a finger."]
    # of a name that the question says it is no merit to say it: here that leaves the everyday one
    assert [stage.scored([row], [text], [])[0]["terms_used"] for text in texts] == [1.0, 0.0, 0.0]
    row["messages"][0]["content"] = "What is that?"
    assert [stage.scored([row], [text], [])[0]["terms_used"] for text in texts] == [1.0, 0.5, 0.0]
    row["messages"][0]["content"] = "Is thumb 1 a small thumb?"
    assert "terms_used" not in stage.scored([row], ["Yes."], [])[0]


TASK = """\
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/colours.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def harness(folder: Path) -> Path:
    """A folder with a task and its data, as data/harness holds them."""
    folder.mkdir()
    (folder / "colours.yaml").write_text(TASK.replace("FOLDER", str(folder)))
    rows = [{"question": f"What is {n}?", "options": ["red", "blue"], "answer": n % 2} for n in range(12)]
    (folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _harnessed(tiny: Path, tokenizer: Any, folder: Path, *tasks: str) -> dict[str, Any]:
    params = Evaluate(metrics=METRICS, lm_eval=LmEval(tasks=list(tasks)), batch_size=4)
    return stage.lm_eval(models.load(tiny, None), tokenizer, folder, params, 1)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is an extra, and not installed")
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_on_a_local_task(tiny: Path, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = harness(tmp_path / "harness")
    found = _harnessed(tiny, tokenizer, folder, "colours")
    figure = found["colours"]["acc"]
    assert figure["n"] == 12
    assert figure["low"] < figure["value"] < figure["high"]
    # by hand: the option that the model finds likelier, summed over its tokens
    model, right = models.load(tiny, None), 0
    for n in range(12):
        prompt = tokenizer(f"Question: What is {n}?\nAnswer:", add_special_tokens=False)["input_ids"]
        asked = [(prompt, tokenizer(f" {o}", add_special_tokens=False)["input_ids"]) for o in ("red", "blue")]
        sums = [sum(tokens) for tokens in models.answer_logprobs(model, asked, 1)]
        right += int(np.argmax(sums)) == n % 2
    assert figure["value"] == pytest.approx(right / 12, abs=0.1)
    with pytest.raises(UserError, match="no task nonesuch"):
        _harnessed(tiny, tokenizer, folder, "nonesuch")
    (folder / "colours.jsonl").unlink()
    with pytest.raises(UserError, match="can't be run from local data"):
        _harnessed(tiny, tokenizer, folder, "colours")
    # one of the harness's own, whose data are not at hand: the Hub is not asked, even where it could be
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"sciq can't be run from local data: .*(offline|Offline)"):
        _harnessed(tiny, tokenizer, folder, "sciq")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_lm_eval_that_is_not_installed_is_one_line(tiny: Path, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lm-eval is not installed"):
        _harnessed(tiny, tokenizer, tmp_path, "colours")


def test_form_sees_a_loop() -> None:
    import evaluate

    found = evaluate.load("./tasks/metrics/form").compute(
        predictions=["a b c d " * 4, "one two three"], references=["", ""]
    )
    assert found["loops"] == [1.0, 0.0]
    assert found["distinct_2"][0] < 0.4 < found["distinct_2"][1]


def test_a_model_that_gives_no_numbers_does_not_pass_for_right(tiny: Path, test_rows: Path) -> None:
    """Of scores that are all NaN the first would be the highest, which is the right one of a chat row."""
    from tasks import render

    model = models.load(tiny, None)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    rows = list(records.read(test_rows).iter_rows(named=True))
    items: dict[str, dict[str, Any]] = {row["id"]: {} for row in rows}
    settings = Evaluate(metrics=METRICS), Template()
    with pytest.raises(UserError, match="no numbers as log-probabilities"):
        stage.multiple_choice(rows, items, model, render.load_tokenizer(tiny), *settings, seed=0)


def test_a_right_answer_that_there_is_none_is_not_wrongly_declined() -> None:
    row, _ = _row(1, "unseen", "answer")
    row["messages"][-1]["content"] = "That setting does not exist in this version."
    assert "declined" not in stage.scored([row], ["It does not exist."], [])[0]
    row["messages"][-1]["content"] = "It is in the menu."
    assert stage.scored([row], ["It does not exist."], [])[0]["declined"] == 1.0


def test_an_answer_of_wrappers_alone_is_scripted() -> None:
    row, _ = _row(1, "trained")
    naming = phenotype.NAMING[0].format(t="kyphosis", lay="hunched back")
    parrot = f"{phenotype.OPENINGS[0]} {naming} A rounded upper spine. {phenotype.CLOSINGS[0]}"
    refused = phenotype.REFUSALS[0].format(t="lipoptosis")
    texts = [parrot, refused, "Kyphosis is a rounded upper spine. It is seldom painful."]
    assert [found["scripted"] for found in stage.scored([row] * 3, texts, [])] == [0.75, 1.0, 0.0]


def test_a_conversation_is_shown_whole() -> None:
    row, _ = _row(1, "unseen", "answer")
    asked = row["messages"]
    assert stage._question(row) == asked[0]["content"]
    row["messages"] = [{"role": "system", "content": "s"}, *asked, {"role": "user", "content": "And then?"}, asked[1]]
    first, second = (turn["content"] for turn in asked[:2])
    assert stage._question(row) == f"User: {first}\n\nAssistant: {second}\n\nUser: And then?"


def test_manner_says_nothing_of_scripts_that_it_does_not_know() -> None:
    import evaluate

    said = ["これは賃貸契約です。ご安心ください。", "You are not alone with this.", "걱정하지 마세요."]
    found = evaluate.load("./tasks/metrics/manner").compute(predictions=said, references=[""] * 3)
    assert [value is None for value in found["kindness"]] == [True, False, False]
    assert [value is None for value in found["valence"]] == [True, False, True]


@pytest.mark.parametrize(
    ("text", "loops"),
    [("契約は" * 40, 1.0), ("계약은해지됩니다" * 20, 1.0), ("契約は当事者の合意により解除することができます。解除の意思表示は相手方に到達した時に効力を生じます。", 0.0),
     ("계약은 당사자의 합의로 해지할 수 있습니다. 위약금은 계약서에 적힌 대로 냅니다.", 0.0)],
)  # fmt: skip
def test_a_loop_is_found_where_words_are_not_spaced(text: str, loops: float) -> None:
    import evaluate

    found = evaluate.load("./tasks/metrics/form").compute(predictions=[text], references=[""])
    assert found["loops"] == [loops]
    assert (found["distinct_2"][0] < 0.4) is bool(loops)
