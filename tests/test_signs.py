"""Figures of the report and the card are of the model that they are said of."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tasks import report
from tasks.params import Report
from tests.test_report import Items, answers, made, write_inputs


def wrong(items: Items) -> Items:
    """The same, with no general question answered."""
    return [item | ({"correct": 0.0} if item["set"] == "general" else {}) for item in items]


@pytest.mark.parametrize(
    ("model", "lost", "crossed"),
    [(None, "2.5 %", False), ("base", "−82.5 %", False), ("sft", "2.5 %", False), ("dpo", "85.0 %", True)],
)
def test_what_was_forgotten_is_what_base_knew_and_dpo_does_not(model: str | None, lost: str, crossed: bool) -> None:
    items = {name: wrong(answers(name)) if name == model else answers(name) for name in report.MODELS}
    signs = {sign.name: sign for sign in report.watch(Report(), {"dpo": {}}, items, {}, {"kinds": {"given": 9}})}
    sign = signs["General accuracy lost, base − DPO"]
    assert (sign.value, sign.limit, sign.crossed) == (lost, "≤ 5.0 % (report.max_general_drop)", crossed)


def test_the_cards_results_are_those_of_dpo(tmp_path: Path) -> None:
    data = write_inputs(tmp_path / "data", curves=False)
    made(data)
    base, sft, dpo = (
        json.loads((data / f"evaluate/{name}.json").read_text())["manner"]["kindness"]["value"]
        for name in report.MODELS
    )
    results = {r.metric_type: r.metric_value for r in ModelCard.load(data / "report/README.md").data.eval_results or []}
    assert results["manner.kindness"] == dpo
    assert len({base, sft, dpo}) == 3
