"""sft: supervised fine-tuning, QLoRA through trl.SFTTrainer (Dettmers et al. 2023, arXiv:2305.14314).

The base is loaded as `quantization` says, the adapter as `lora` says, and trained as `sft` says, all three the libraries'
own configs. Rows come tokenised, with their labels, from `template`.
"""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from pyarrow import parquet
from trl import SFTConfig, SFTTrainer

from tasks import models, params, render, stage, training


def run(
    base: Path, facts: Path, rows: Path, adapter: Path, plots: Path, metrics: Path,
    params: dict[str, Any], lora: dict[str, Any], quantization: dict[str, Any] | None, seed: int,
) -> str:  # fmt: skip
    """Train `adapter` on `rows` (train.parquet and validation.parquet with input_ids and labels).

    Raises:
        UserError: the loss is no number, or LoRA's targets are not in the model.
    """
    check(lora, facts)
    folder = training.checkpoint_folder(
        "sft", [base, rows], {"sft": params, "lora": lora, "quantization": quantization, "seed": seed}
    )
    parts = {
        name: Dataset.from_parquet(str(path), cache_dir=str(folder / "cache"), keep_in_memory=True)
        for name, path in ((name, rows / f"{name}.parquet") for name in ("train", "validation"))
        if parquet.read_metadata(path).num_rows  # of a table without rows `datasets` makes none
    }
    validated = "validation" in parts
    given = training.arguments(params, seed, folder, validated)
    given |= {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": True}
    config = training.config(SFTConfig, "sft", given)
    longest = max(len(ids) for part in parts.values() for ids in part["input_ids"])
    tokenizer = render.load_tokenizer(base)
    model = models.new_adapter(models.load(base, quantization, models.attention(longest)), lora, seed)
    watch = training.Watch()
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=parts["train"].select_columns(["input_ids", "labels"]),
        eval_dataset=parts["validation"].select_columns(["input_ids", "labels"]) if validated else None,
        processing_class=tokenizer,
        callbacks=[watch, training.Curves(plots), *training.early_stopping(params, validated)],
    )
    training.train(trainer, folder, params)
    models.save_adapter(trainer.model, adapter)
    result = training.summary(trainer, watch)
    metrics.write_text(json.dumps(result, indent=2) + "\n")
    training.clear(folder)
    return f"{result['steps']} steps, loss {result['loss_first']:.3f} → {result['loss_last']:.3f}, {result['trainable_parameters'] / 1e6:.1f} M trainable parameters"


def check(lora: dict[str, Any], facts: Path) -> None:
    params.check_model(lora, json.loads(facts.read_text()))


if __name__ == "__main__":
    stage.main(run)
