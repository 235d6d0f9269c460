"""The figures, on the tiny model and on scores made by hand."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tasks import evaluate as stage
from tasks import models, records
from tasks.params import Evaluate, Template

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
    rows: Path, base: Path, model: Path, reference: Path, out: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    params = Evaluate(batch_size=8, max_new_tokens=8, bootstrap=200, metrics=METRICS)
    stage.run(
        rows,
        base,
        model,
        reference,
        out / "m.json",
        out / "a.jsonl",
        params=params,
        template=Template(),
        generation={},
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


def test_choice_is_the_best_mean_loglikelihood(test_rows: Path, tiny: Path, tmp_path: Path, tokenizer) -> None:
    _, items = _run(test_rows, tiny, tiny, tiny, tmp_path)
    item = next(i for i in items if i["set"] == "general")
    row = next(r for r in records.read(test_rows).to_dicts() if r["id"] == item["id"])
    from tasks import chat

    model = models.load(tiny, None)
    prompt = chat.encode_prompt(tokenizer, row["messages"], None)
    encoded = [chat.encode_answer(tokenizer, row["messages"], f"The answer is {o}.", None) for o in row["options"]]
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


def test_interval() -> None:
    found = stage.interval([0.0] * 50 + [1.0] * 50, 2000, 1)
    assert found["value"] == 0.5
    assert 0.38 < found["low"] < 0.42
    assert 0.58 < found["high"] < 0.62
    assert stage.interval([1.0, 1.0], 200, 1) == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 2}


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
    assert stage.divergence(one, other, rows, 2) == pytest.approx(wanted / tokens, abs=1e-4)
    assert stage.divergence(one, one, rows, 2) == 0.0


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


def test_form_sees_a_loop() -> None:
    import evaluate

    found = evaluate.load("./tasks/metrics/form").compute(
        predictions=["a b c d " * 4, "one two three"], references=["", ""]
    )
    assert found["loops"] == [1.0, 0.0]
    assert found["distinct_2"][0] < 0.4 < found["distinct_2"][1]
