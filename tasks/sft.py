"""sft: supervised fine-tuning, QLoRA through trl.SFTTrainer (Dettmers et al. 2023, arXiv:2305.14314).

The base is loaded as `quantization` says, the adapter as `lora` says, and trained as `sft` says, all three the libraries'
own configs. Rows come tokenised, with their labels, from `template`.
"""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from tasks import chat, models, params, stage, training


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
    train = Dataset.from_parquet(str(rows / "train.parquet"), cache_dir=str(folder / "cache"), keep_in_memory=True)
    validation = Dataset.from_parquet(
        str(rows / "validation.parquet"), cache_dir=str(folder / "cache"), keep_in_memory=True
    )
    given = training.arguments(params, seed, folder, bool(len(validation)))
    given |= {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": True}
    config = training.config(SFTConfig, "sft", given)
    longest = max(len(ids) for part in (train, validation) for ids in part["input_ids"])
    tokenizer = chat.load_tokenizer(base)
    model = models.new_adapter(models.load(base, quantization, models.attention(longest)), lora, seed)
    watch = training.Watch()
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=train.select_columns(["input_ids", "labels"]),
        eval_dataset=validation.select_columns(["input_ids", "labels"]) if len(validation) else None,
        processing_class=tokenizer,
        callbacks=[watch, training.Curves(plots), *training.early_stopping(params)],
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
