"""What a model is asked: each prompt begins with the system message, and no wrong option gives itself away."""

import json
import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from transformers import GenerationMixin

from tasks import evaluate, models, pair, records
from tasks.params import Evaluate, Template
from tests.conftest import LORA, make_tiny

SYSTEM = Template(system="Explain.")
OPENING = "<|im_start|>system\nExplain.<|im_end|>\n<|im_start|>user\n"


@pytest.fixture
def asked(tokenizer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that transformers is given to go on from, as text, without padding."""
    seen: list[str] = []
    own = GenerationMixin.generate

    def generate(self: Any, **named: Any) -> Any:
        rows = zip(named["input_ids"], named["attention_mask"].bool(), strict=True)
        seen.extend(tokenizer.decode(ids[real]) for ids, real in rows)
        return own(self, **named)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    return seen


def _row(number: int, kind: str, task: str, *said: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=False)]
    return {
        "kind": kind, "source": "s", "line": 1, "license": "l", "concept": f"c{number}", "topic": "t", "task": task,
        "messages": turns, **more,
    }  # fmt: skip


def test_an_evaluation_asks_with_the_system_message(
    tiny: Path, tokenizer, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options, answers, their other wordings and samples, and what the divergences are measured on."""
    scored: list[list[int]] = []
    measured: list[list[int]] = []

    def recorded(name: str, prompts: list[list[int]]) -> None:
        own = getattr(models, name)

        def record(model: Any, rows: Any, *more: Any, **named: Any) -> Any:
            prompts.extend(prompt for prompt, _ in rows)
            return own(model, rows, *more, **named)

        monkeypatch.setattr(models, name, record)

    recorded("answer_logprobs", scored)
    recorded("distributions", measured)
    rows = [
        _row(1, "chat", "definition", "What is a short thumb?", "A thumb that is shorter than usual."),
        _row(2, "chat", "definition", "What is kyphosis?", "A hunched back."),
        _row(3, "question", "advice", "Is it urgent?"),
        _row(4, "choice", "choice", "What is a thumb?", options=["a finger", "an eye"], answer=0),
    ]
    sets = pl.Series("set", ["trained", "trained", "advice", "general"])
    records.write(records.frame(rows).with_columns(sets), tmp_path / "test.parquet")
    other = make_tiny(tmp_path / "other", initializer_range=0.1)
    evaluate.run(
        tmp_path / "test.parquet", tiny, other, tiny, tmp_path, tmp_path / "m.json", tmp_path / "a.jsonl",
        params=Evaluate(max_new_tokens=4, bootstrap=100, metrics=[], reworded=1, noise_items=1, noise_seeds=2),
        template=SYSTEM, generation={}, quantization=None, seed=1,
    )  # fmt: skip
    # three answers, two other wordings, one of each set greedily and twice sampled; two options each
    assert (len(asked), len(scored)) == (3 + 2 + 2 * 3, 3 * 2)
    answers = [json.loads(line).get("answer") for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(measured) == 2 * (1 + sum(map(bool, answers))) > 2  # a general row and what was said, by both models
    for text in [*asked, *tokenizer.batch_decode(scored), *tokenizer.batch_decode(measured)]:
        assert text.startswith(OPENING)


def test_what_the_sft_model_makes_up_is_asked_with_the_system_message(
    tiny: Path, asked: list[str], tmp_path: Path
) -> None:
    models.save_adapter(models.new_adapter(models.load(tiny, None), LORA, 0), tmp_path)
    questions = ["What is a short thumb?", "thumb?"]
    rows = [{"messages": [{"role": "user", "content": text}]} for text in questions]
    assert len(pair._answers(rows, tiny, tmp_path, SYSTEM, None, {}, 1)) == 2
    assert asked == [f"{OPENING}{text}<|im_end|>\n<|im_start|>assistant\n" for text in questions]


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_a_pair_is_as_long_as_its_longer_side_behind_the_system_message(tokenizer, longer: str) -> None:
    sides = {"chosen": "A thumb.", "rejected": "A finger."} | {longer: "A thumb that is shorter than usual."}
    asked = [{"role": "user", "content": "What is it?"}]
    whole = f"{OPENING}What is it?<|im_end|>\n<|im_start|>assistant\n{sides[longer]}<|im_end|>"
    wanted = len(tokenizer(whole, add_special_tokens=False)["input_ids"])
    assert pair._tokens({"messages": asked, **sides}, tokenizer, SYSTEM) == wanted


def test_a_wrong_option_is_as_long_and_of_another_concept() -> None:
    """One that is much longer or shorter gives the right one away; one of its concept, or of its words, may be as right."""

    def row(concept: str, letter: str, length: int) -> dict[str, Any]:
        return _row(0, "chat", "definition", "q", letter * length) | {"concept": concept, "term": None, "lay": None}

    right = row("a", "r", 20)
    near = [row(f"near {letter}", letter, 20 + i % 3) for i, letter in enumerate("uvwxyz")]
    far = [row(f"far {letter}", letter, (200, 2)[i % 2]) for i, letter in enumerate("cdefghijklmn")]
    pool = [right, row("b", "R", 20), row("a", "s", 20), *far, *near]
    texts = {other["messages"][-1]["content"] for other in near}
    drawn = set[str]()
    for seed in range(20):
        first, *wrong = evaluate.options_of(right, pool, 3, random.Random(seed))
        assert first == "r" * 20
        assert len({*wrong}) == 2
        drawn |= {*wrong}
    assert drawn == texts
