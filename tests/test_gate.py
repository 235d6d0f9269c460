"""The gate on scores made by hand: what is promoted, what is not, and in which words."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from flows import gate
from tasks import params
from tasks.params import Gate, Limit, UserError
from tests.conftest import ROOT

CORRECT, DECLINED = "trained.definition.correct", "trained.definition.declined"


def items(right: int, of: int = 100, *, part: str = "trained", measure: str = "correct") -> list[dict[str, Any]]:
    """`of` items, the first `right` of which score 1."""
    task = "choice" if part == "general" else "definition"
    return [{"id": f"{part}-{i:03}", "set": part, "task": task, measure: float(i < right)} for i in range(of)]


def limits(key: str = CORRECT, *, drop: float = 0.05, **limit: float) -> Gate:
    return Gate(limits={key: Limit(**({"margin": 0.05} | limit))}, max_general_drop=drop, bootstrap=2000)


GENERAL = items(60, part="general")


def decided(champion: int | None, challenger: int, asked: Gate) -> gate.Verdict:
    old = None if champion is None else items(champion) + GENERAL
    return gate.decide(old, items(challenger) + GENERAL, GENERAL, asked)


@pytest.mark.parametrize(
    ("champion", "challenger", "limit", "promoted", "said"),
    [
        # the very same answers
        (90, 90, {}, True, "no different from the champion, item by item"),
        # ten items of a hundred better: the interval of the difference is above 0
        (80, 90, {}, True, "better in trained.definition.correct (+0.100)"),
        # two items worse: −0.02, the bad end of the interval is about −0.05
        (92, 90, {"margin": 0.06}, True, "not worse than the champion"),
        (92, 90, {"margin": 0.02}, False, "may be worse by up to"),
        # ten worse: even the good end of the interval is outside of the margin
        (90, 70, {}, False, "is worse by"),
        # a first run: the floor alone decides
        (None, 90, {"floor": 0.85}, True, "the first model, within all 2 limits"),
        (None, 80, {"floor": 0.85}, False, "is 0.800, below its floor 0.85"),
        # better than the champion, and still below the floor
        (50, 80, {"floor": 0.85}, False, "below its floor"),
        # a floor that is just met is met, whatever its binary fraction
        (70, 70, {"floor": 0.7}, True, "no different"),
    ],
)
def test_more_is_better(
    champion: int | None, challenger: int, limit: dict[str, float], promoted: bool, said: str
) -> None:
    verdict = decided(champion, challenger, limits(**limit))
    assert verdict.promoted is promoted, verdict.sentence
    assert said in verdict.sentence
    assert verdict.sentence.startswith("Promoted: " if promoted else "Rejected: ")


@pytest.mark.parametrize(
    ("champion", "challenger", "promoted", "said"),
    [
        (8, 2, True, "better in"),
        (2, 12, False, "above its ceiling 0.1"),
        (0, 9, False, "worse by"),
        (5, 5, True, "no different"),
    ],
)
def test_less_is_better_with_a_ceiling(champion: int, challenger: int, promoted: bool, said: str) -> None:
    old, new = (items(n, measure="declined") + GENERAL for n in (champion, challenger))
    verdict = gate.decide(old, new, GENERAL, limits(DECLINED, ceiling=0.1))
    assert verdict.promoted is promoted
    assert said in verdict.sentence


def test_forgetting_is_measured_against_the_base_and_not_the_champion() -> None:
    """The champion had lost 4 points, the challenger loses 4 more: each step is small, the sum is not."""
    base, champion, challenger = (items(n, part="general") for n in (60, 56, 52))
    verdict = gate.decide(items(90) + champion, items(90) + challenger, base, limits())
    assert not verdict.promoted
    assert "(against the base) fell by 0.080 since the base" in verdict.sentence
    assert gate.decide(items(90) + champion, items(90) + challenger, base, limits(drop=0.08)).promoted


def test_general_items_that_are_missing_reject_and_none_at_all_is_noted() -> None:
    assert not gate.decide(items(90), items(90), GENERAL, limits()).promoted
    verdict = gate.decide(items(90), items(90), [], limits())
    assert verdict.promoted
    assert "whether anything was forgotten is not known" in verdict.notes[0]


def test_pairs_are_by_id_and_what_only_one_side_has_is_named() -> None:
    shuffled = items(90) + GENERAL
    random.Random(0).shuffle(shuffled)
    assert gate.decide(items(90) + GENERAL, shuffled, GENERAL, limits()).sentence.startswith("Promoted: no different")
    verdict = gate.decide(items(90, 100) + GENERAL, items(90, 120) + GENERAL, GENERAL, limits())
    assert "20 items (trained-100, trained-101, trained-102, …) only of the challenger" in verdict.rows[0].reason
    assert verdict.rows[0].n == 100
    few = gate.decide(items(9, 9) + GENERAL, items(90) + GENERAL, GENERAL, limits())
    assert not few.promoted
    assert "9 items in common with the champion, fewer than 10" in few.sentence


@pytest.mark.parametrize("broken", [math.nan, math.inf, None, "0.5"])
def test_a_score_that_is_no_number_counts_against_the_challenger_alone(broken: object) -> None:
    bad = [*items(90)[:-1], items(90)[-1] | {"correct": broken}, *GENERAL]
    verdict = gate.decide(items(90) + GENERAL, bad, GENERAL, limits())
    assert not verdict.promoted
    assert "is no finite number in 1 item (trained-099) of the challenger" in verdict.sentence
    assert gate.decide(bad, items(90) + GENERAL, GENERAL, limits()).promoted


def test_an_item_that_was_answered_without_a_score_counts_against_the_challenger_alone() -> None:
    """An answer in another script has no kindness; left out, a model of such answers would pass."""
    key = "trained.definition.kindness"
    kind = items(90, measure="kindness") + GENERAL
    mute = [
        {k: v for k, v in i.items() if k != "kindness" or n >= 40} for n, i in enumerate(items(90, measure="kindness"))
    ]
    verdict = gate.decide(kind, mute + GENERAL, GENERAL, limits(key, floor=0.5))
    assert not verdict.promoted
    said = "has no score in 40 of 100 items (trained-000, trained-001, trained-002, …) of the challenger in which the champion has one"
    assert said in verdict.sentence
    assert gate.decide(mute + GENERAL, kind, GENERAL, limits(key)).promoted
    assert gate.decide(kind, kind[40:], GENERAL, limits(key)).promoted  # items that one side does not have at all
    general = [{k: v for k, v in i.items() if k != "correct" or n} for n, i in enumerate(GENERAL)]
    verdict = gate.decide(kind, kind[:100] + general, GENERAL, limits(key))
    assert "(against the base) has no score in 1 of 100 items (general-000)" in verdict.sentence
    # consistency is of a sample, which moves with the rows of the test
    asked = limits("trained.definition.consistency")
    before, after = (
        [i | {"consistency": 1.0, "reworded": []} if n in chosen else i for n, i in enumerate(items(90))]
        for chosen in (range(50), range(10, 60))
    )
    assert gate.decide(before + GENERAL, after + GENERAL, GENERAL, asked).promoted


def test_a_measure_that_nobody_has_is_rejected_with_the_nearest() -> None:
    verdict = gate.decide(items(90) + GENERAL, items(90) + GENERAL, GENERAL, limits("trained.definition.corect"))
    assert not verdict.promoted
    assert "did you mean `trained.definition.correct`?" in verdict.sentence


@pytest.mark.parametrize("key", ["correct", "trained.correct", "*.definition.correct", "a.b.*", "a..b"])
def test_a_key_that_can_not_name_a_measure(key: str) -> None:
    with pytest.raises(UserError, match=r"expected SET\.TASK\.MEASURE"):
        gate.check(limits(key))


def test_no_limits_promote_nothing() -> None:
    verdict = gate.decide(None, items(100), [], Gate())
    assert not verdict.promoted
    assert "gate.limits of params.yaml is empty" in verdict.sentence


def test_any_task_of_a_set() -> None:
    more = [item | {"id": f"lay-{item['id']}", "task": "lay_to_clinical"} for item in items(50)]
    verdict = gate.decide(None, items(90) + more + GENERAL, GENERAL, limits("trained.*.correct", floor=0.69))
    assert verdict.promoted
    assert verdict.rows[0].challenger == pytest.approx(0.7)


@pytest.mark.parametrize(("confidence", "promoted"), [(0.6, True), (0.95, False)])
def test_how_sure_it_must_be_is_asked_for(confidence: float, promoted: bool) -> None:
    """Two items of a hundred worse: how far that may go is what the confidence says."""
    verdict = decided(92, 90, limits(margin=0.04).model_copy(update={"confidence": confidence}))
    assert verdict.promoted is promoted, verdict.sentence
    assert f"difference [{100 * confidence:g} %]" in verdict.markdown()


def test_the_same_scores_give_the_same_verdict_and_page() -> None:
    first, second = (decided(92, 90, limits(margin=0.06)) for _ in range(2))
    assert first == second
    page = first.markdown()
    assert page.startswith("# Promoted\n\nPromoted: not worse")
    assert "| ✓ | `trained.definition.correct` | 100 | 0.920 | 0.900 | -0.020 [" in page
    assert "| ≥ champion − 0.06 |" in page


def test_the_limits_of_params_yaml_name_what_the_evaluation_writes(pipeline: Path) -> None:
    """Every measure of the shipped limits is in the items of a real run."""
    asked = params.load(ROOT / "params.yaml")["gate"]
    rows = [json.loads(line) for line in (pipeline / "data/evaluate/dpo.answers.jsonl").read_text().splitlines()]
    verdict = gate.decide(rows, rows, rows, Gate(limits={k: Limit(margin=v.margin) for k, v in asked.limits.items()}))
    known = {row.measure: row for row in verdict.rows}
    assert set(asked.limits) < set(known)
    assert not any("is in no item" in row.reason for row in verdict.rows)


def test_a_choice_among_other_options_is_no_pair() -> None:
    """Wrong options are answers of other rows of the test, so that a larger test asks otherwise."""
    before = [item | {"options": "a"} for item in items(90)]
    after = [item | {"options": "a" if n % 2 else "b"} for n, item in enumerate(items(90))]
    verdict = gate.decide(before, after + GENERAL, GENERAL, limits())
    assert next(row.n for row in verdict.rows if row.measure == CORRECT) == 50
    verdict = gate.decide(
        items(90), after + GENERAL, GENERAL, limits()
    )  # of a champion that says nothing of its options
    assert next(row.n for row in verdict.rows if row.measure == CORRECT) == 100
