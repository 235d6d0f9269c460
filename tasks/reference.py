"""reference: the reference policy's log-probabilities of every pair, computed once.

The reference of DPO is the SFT model, which no DPO parameter changes. Its log-probabilities are an artifact of their own, so
that another `beta` or learning rate, here or on a team mate's machine, never computes them again.
"""

import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import torch

from tasks import models, render, stage
from tasks import records as recs
from tasks.params import Reference, Template, UserError

IDS = pl.List(pl.Int32)
SCHEMA: dict[str, Any] = {
    "id": pl.String,
    "kind": pl.String,
    "part": pl.String,
    "prompt_ids": IDS,
    "chosen_ids": IDS,
    "rejected_ids": IDS,
    "ref_chosen_logps": pl.Float64,
    "ref_rejected_logps": pl.Float64,
}


def run(
    pairs: Path, base: Path, adapter: Path, out: Path, metrics: Path,
    params: Reference, template: Template, quantization: dict[str, Any] | None,
) -> str:  # fmt: skip
    """Write `out` (Parquet): id, kind, part, prompt_ids, chosen_ids, rejected_ids, ref_chosen_logps, ref_rejected_logps.

    The log-probabilities are sums over an answer's tokens, its end-of-sequence token included, in nats (Rafailov et al.
    2023, arXiv:2305.18290, equation 7).

    Without pairs (`pair.mode: none`) both are empty, and no model is loaded.

    Raises:
        UserError: a pair is longer than `template.max_length`, or a log-probability is no number.
    """
    table = recs.read(pairs)
    if not table.height:
        recs.write(pl.DataFrame(schema=SCHEMA), out)
        metrics.write_text("{}\n")
        return "no pairs"
    tokenizer = render.load_tokenizer(base)
    rows: list[dict[str, Any]] = []
    for pair in table.iter_rows(named=True):
        prompt = render.encode_prompt(tokenizer, pair["messages"], template.system)
        sides = {
            side: render.encode_answer(tokenizer, pair["messages"], pair[side], template.system)
            for side in ("chosen", "rejected")
        }
        longest = len(prompt) + max(len(ids) for ids in sides.values())
        if longest > template.max_length:
            raise UserError(f"pair {pair['id']}: {longest} tokens, more than template.max_length {template.max_length}")
        rows.append(
            {
                "id": pair["id"],
                "kind": pair["kind"],
                "part": pair["part"],
                "prompt_ids": prompt,
                "chosen_ids": sides["chosen"],
                "rejected_ids": sides["rejected"],
            }
        )
    model = models.load_adapter(models.load(base, quantization), adapter, trainable=False)
    asked = [(row["prompt_ids"], row[f"{side}_ids"]) for row in rows for side in ("chosen", "rejected")]
    # under the same autocast as training, so that step 0 of DPO finds a log-ratio of zero
    with torch.autocast(models.device().type, models.compute_dtype(), enabled=models.compute_dtype() != torch.float32):
        scores = [
            sum(tokens) for tokens in models.answer_logprobs(model, asked, params.batch_size, progress="reference")
        ]
    for index, row in enumerate(rows):
        row["ref_chosen_logps"], row["ref_rejected_logps"] = scores[2 * index], scores[2 * index + 1]
        for side in ("chosen", "rejected"):
            if not math.isfinite(row[f"ref_{side}_logps"]):
                raise UserError(
                    f"pair {row['id']}: the reference's log-probability of its {side} answer is {row[f'ref_{side}_logps']}; was the training of sft stable, and does fp16 hold its values?"
                )
    recs.write(pl.DataFrame(rows, schema=SCHEMA, orient="row"), out)
    chosen, rejected = (
        sum(row[f"ref_{side}_logps"] for row in rows) / sum(len(row[f"{side}_ids"]) for row in rows)
        for side in ("chosen", "rejected")
    )
    prefers = sum(row["ref_chosen_logps"] > row["ref_rejected_logps"] for row in rows) / len(rows)
    metrics.write_text(
        json.dumps(
            {
                "chosen_logps_per_token": round(chosen, 4),
                "rejected_logps_per_token": round(rejected, 4),
                "already_prefers_chosen": round(prefers, 4),
            },
            indent=2,
        )
        + "\n"
    )
    return f"{len(rows)} pairs; per token log p of chosen {chosen:.2f}, of rejected {rejected:.2f}"


if __name__ == "__main__":
    stage.main(run)
