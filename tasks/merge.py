"""merge: the adapter into the base's weights, upcast first, by measurement.

Candidates are merging into the original 16-bit base and into the dequantised one, on which the adapter was trained. The one
whose next-token distributions are closer to those of the adapter on its quantised base, over held-out rows, is kept. See
docs/decisions/0006-merge.md.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks import card, models, render, stage
from tasks import records as recs
from tasks.params import Merge, Template, UserError

BATCH = 8
MOST_TOKENS = 4096  # compared: each has the whole vocabulary in float32, 2.3 GiB for one of 152,000


def run(
    base: Path,
    facts: Path,
    adapter: Path,
    dpo: Path,
    rows: Path,
    records: Path,
    model: Path,
    metrics: Path,
    params: Merge,
    quantization: dict[str, Any] | None,
    template: Template,
) -> str:
    """Save the closer candidate to `model` as safetensors, with tokenizer and model card; write how close each is to `metrics`.

    Args:
        facts: facts.json of `base`, for the card; likewise `dpo`, metrics.json of that stage, and `records`, the validated
            rows with their sources and licences.

    Raises:
        UserError: the closer one is further than `merge.max_kl` from the adapter on its base, or no number says how far.
    """
    held_out = answers(rows / "validation.parquet", params.prompts) or answers(rows / "train.parquet", params.prompts)
    held_out.sort(key=lambda row: -len(row[0]) - len(row[1]))  # batches of like length
    target = [*_distributions(models.load_adapter(models.load(base, quantization), adapter, trainable=False), held_out)]
    names = {"dequantized": True, "16bit": False} if quantization is not None else {"16bit": False}
    found: dict[str, dict[str, float]] = {}
    best, kept, stored = "", None, models.stored_dtype(base)
    for name, onto in names.items():
        candidate = models.load_merged(base, adapter, quantization, onto_dequantized=onto)
        # measured in what holds every value that is saved: on a CPU in what is fast, on a GPU, where it has to fit, as it is
        wide = torch.promote_types(stored, models.compute_dtype()) if models.device().type == "cpu" else stored
        found[name] = compare(target, _distributions(models.cast(candidate, wide), held_out))
        if kept is None or _far(found[name]) < _far(found[best]):
            kept = None  # two of them need not lie in memory
            best, kept = name, models.cast(candidate.to("cpu"), stored)  # off the GPU, where one model has to fit
        del candidate
    assert kept is not None
    result = {
        "kept": best,
        "tokens": sum(len(t) for t in target),
        "kl": found[best]["kl"],
        "top1": found[best]["top1"],
        "candidates": found,
        "prompt": {
            "system": template.system,
            "question": card.question(records, rows / "train.parquet"),
        },  # for the model cards
    }
    metrics.write_text(json.dumps(result, indent=2) + "\n")
    if not math.isfinite(found[best]["kl"]):
        raise UserError(
            f"the merged model is {found[best]['kl']} nats per token from the adapter on its base: some of its logits are no number; was the training stable, and does fp16 hold its values?"
        )
    if found[best]["kl"] > params.max_kl:
        raise UserError(
            f"the merged model is {found[best]['kl']:.4f} nats per token from the adapter on its base, more than merge.max_kl {params.max_kl}; serve the adapter on the quantised base instead, or raise the limit"
        )
    shutil.rmtree(model, ignore_errors=True)
    kept.config._name_or_path = kept.name_or_path = ""
    tokenizer = render.load_tokenizer(base)
    if (ends := render.ends(kept, tokenizer)) != [kept.generation_config.eos_token_id]:
        kept.generation_config.eos_token_id = ends  # whoever serves the model reads no tokenizer for it
    kept.save_pretrained(str(model), max_shard_size=params.max_shard_size)
    tokenizer.save_pretrained(str(model))
    with (adapter / "adapter_model.safetensors").open("rb") as weights:
        lineage = {"adapter": hashlib.file_digest(weights, "sha256").hexdigest()}
    described = json.loads(facts.read_text(encoding="utf-8"))
    text = card.render(
        described, card.sources(records), result, preferred=card.preferred(json.loads(dpo.read_text())), lineage=lineage
    )
    (model / "README.md").write_text(text, encoding="utf-8")
    return f"into the {best} base: KL {found[best]['kl']:.5f} nats per token, top-1 agreement {found[best]['top1']:.4f}"


def answers(path: Path, count: int) -> list[models.Row]:
    """(prompt, answer) of the first `count` rows, of `MOST_TOKENS` in all: cut at the first supervised token."""
    out, left = list[models.Row](), MOST_TOKENS
    for ids, labels in recs.read(path).head(count).select("input_ids", "labels").iter_rows():
        at = next(i for i, label in enumerate(labels) if label != render.IGNORED)
        if not left:
            break
        out.append((ids[:at], ids[at : at + left]))
        left -= len(out[-1][1])
    return out


def compare(target: Iterable[Tensor], other: Iterable[Tensor]) -> dict[str, float]:
    """Mean KL(target ‖ other) in nats per token, and how often both have the same most likely token."""
    kl, same = list[Tensor](), list[Tensor]()
    for t, o in zip(target, other, strict=True):
        kl.append((t.exp() * (t - o)).sum(-1))
        same.append(t.argmax(-1) == o.argmax(-1))
    return {"kl": round(float(torch.cat(kl).mean()), 6), "top1": round(float(torch.cat(same).float().mean()), 6)}


def _far(found: dict[str, float]) -> float:
    return found["kl"] if math.isfinite(found["kl"]) else math.inf


def _distributions(model: torch.nn.Module, rows: list[models.Row]) -> Iterator[Tensor]:
    """`models.distributions`, of which no more than a batch is held."""
    for start in range(0, len(rows), BATCH):
        yield from models.distributions(model, rows[start : start + BATCH], BATCH)


if __name__ == "__main__":
    stage.main(run)
