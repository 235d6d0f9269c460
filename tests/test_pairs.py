"""What composed pairs are made of: terms, their concepts and wordings, and what each side of a pair says."""

import random
from dataclasses import replace
from typing import Any

import polars as pl
import pytest

from tasks import pair, phenotype, phrases, records
from tasks.params import Pair
from tasks.phenotype import Term

TEXT = "Exaggerated anterior convexity of the thoracic vertebral column."
SAID = {  # by task: question and answer of a training row
    "definition": ("What is kyphosis?", TEXT),
    "lay_to_clinical": ("What is the clinical term for hunched back?", "The clinical term is kyphosis."),
    "clinical_to_lay": ("How is kyphosis called in everyday words?", "In everyday words, kyphosis is hunched back."),
    "group": ("Which group of findings does kyphosis belong to?", "It belongs to: Abnormality of the skeletal system."),
}


def _taught(*tasks: str, **more: Any) -> pl.DataFrame:
    """Training rows of one term."""
    return records.frame(
        {
            "kind": "chat", "source": "s", "line": 1, "license": "l", "concept": "HP:0002808", "topic": "t", "task": task,
            "wording": "train", "term": "Kyphosis", "lay": "hunched back",
            "messages": [{"role": role, "content": text} for role, text in zip(("user", "assistant"), SAID[task], strict=True)],
            **more,
        }
        for task in tasks
    )  # fmt: skip


def _kind(answer: str) -> set[str]:
    """Every way to put `answer` kindly and in everyday words."""
    named = [text.format(t="kyphosis", lay="hunched back") for text in phenotype.NAMING]
    plain = {f"{naming} {answer} {closing}" for naming in named for closing in phenotype.CLOSINGS}
    return plain | {f"{opening} {text}" for opening in phenotype.OPENINGS for text in plain}


def test_each_side_of_a_known_terms_pairs() -> None:
    pairs = pair._known(_taught(*SAID), Pair(known=3, contrast=1, naming=1.0), random.Random(1))
    assert [p["kind"] for p in pairs] == ["known", "matched", "known", "contrast", "naming", "naming"]
    assert {p["concept"] for p in pairs} == {"HP:0002808"}
    assert not [p for p in pairs if phrases.declines(p["chosen"])]
    explained, named = pairs[:4], pairs[4:]
    assert {p["chosen"] for p in explained} <= _kind(TEXT)
    known, matched, again, contrast = (p["rejected"] for p in explained)
    assert known == again == TEXT
    assert matched == f"{TEXT} {SAID['lay_to_clinical'][1]} {SAID['group'][1]}"
    assert contrast in {text.format(t="kyphosis") for text in phenotype.REFUSALS}
    for p, task in zip(named, ("lay_to_clinical", "clinical_to_lay"), strict=True):
        question, answer = SAID[task]
        assert p["messages"] == [{"role": "user", "content": question}]
        assert p["rejected"] == answer
        before = {f"{opening} {answer}" for opening in phenotype.OPENINGS}
        assert p["chosen"] in before | {f"{answer} {closing}" for closing in phenotype.CLOSINGS}


def test_a_known_term_is_asked_about_in_training_wordings_alone() -> None:
    trained = {text.format(t="kyphosis") for text in phenotype.DEFINITION["train"]}
    pairs = pair._known(_taught("definition"), Pair(known=99, contrast=1), random.Random(1))
    assert [len(p["messages"]) for p in pairs] == [1] * len(trained)
    assert {(p["messages"][0]["role"], p["messages"][0]["content"]) for p in pairs} == {("user", t) for t in trained}


def test_a_term_of_which_less_is_taught() -> None:
    one = Pair(known=2, contrast=0, naming=0.0)
    plain, matched = pair._known(_taught("definition", "clinical_to_lay"), one, random.Random(1))
    assert (plain["rejected"], matched["rejected"]) == (TEXT, f"{TEXT} The clinical term is kyphosis.")
    assert pair._known(_taught("lay_to_clinical", "clinical_to_lay"), Pair(), random.Random(1)) == []


def test_a_general_question_keeps_its_plain_answer() -> None:
    rows = _taught("definition", "group", kind="replay")
    manner, refused = pair._general(rows, random.Random(1))
    for p, task in ((manner, "definition"), (refused, "group")):
        assert (p["kind"], p["chosen"]) == ("general", SAID[task][1])
        assert p["messages"] == [{"role": "user", "content": SAID[task][0]}]
    openings = [f"{opening} {TEXT} " for opening in phenotype.OPENINGS]
    assert manner["rejected"] in {opening + closing for opening in openings for closing in phenotype.CLOSINGS}
    assert refused["rejected"] in {text.format(t="that") for text in phenotype.REFUSALS + phenotype.OUTSIDE}


ONE = Term("HP:1", 1, "Hearing loss", "Decreased perception of every sound.", ["deafness"])
TWO = Term("HP:2", 9, "Short thumb", "Reduced length of one digit.", ["stubby finger"])


@pytest.mark.parametrize(
    ("change", "one"),
    [
        pytest.param({}, False, id="nothing"),
        pytest.param({"lay": ["Deafness"]}, True, id="everyday word"),
        pytest.param({"name": "Loss of hearing and smell"}, True, id="2 of 3 words of the name"),
        pytest.param({"name": "Hearing impairment, severe hearing loss"}, True, id="2 of 4"),
        pytest.param({"name": "Loss of hearing, smell and taste, acquired"}, False, id="2 of 5"),
        pytest.param({"definition": "Perception of sound, decreased."}, True, id="3 of 4 words of the definition"),
        pytest.param({"definition": "Decreased perception of light."}, False, id="2 of 5 of them"),
    ],
)
def test_near_copies_are_one_concept(change: dict[str, Any], one: bool) -> None:
    found = phenotype.concepts([replace(TWO, **change), ONE])
    assert found == {"HP:1": "HP:1", "HP:2": "HP:1" if one else "HP:2"}


def test_a_copy_of_a_copy_is_of_the_same_concept() -> None:
    between = Term("HP:3", 5, "Short thumb", "Loss of a sense.", ["deafness"])
    assert phenotype.concepts([TWO, ONE, between]) == dict.fromkeys(("HP:1", "HP:2", "HP:3"), "HP:1")


def test_no_invented_term_is_a_name_or_a_synonym() -> None:
    free = phenotype.invent({}, 20, 1)
    assert len({*free}) == 20
    taken = {"HP:1": replace(ONE, name=free[3].capitalize(), synonyms=["x", free[0].upper()])}
    found = phenotype.invent(taken, 20, 1)
    assert found[:18] == [name for name in free if name not in (free[0], free[3])]
    assert not {*found} & {free[0], free[3]}


def test_what_is_asked_in_the_test_is_asked_in_training_in_no_table() -> None:
    tables = (phenotype.DEFINITION, phenotype.LAY_TO_CLINICAL, phenotype.CLINICAL_TO_LAY, phenotype.GROUP)
    said = [
        (wording, text.format(t="x", lay="x").casefold())
        for table in tables
        for wording, texts in table.items()
        for text in texts
    ]
    assert {wording for wording, _ in said} == {"train", "validation", "test"}
    assert len({text for _, text in said}) == len(said)
