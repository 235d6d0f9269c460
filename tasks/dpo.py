"""dpo: direct preference optimisation on the SFT adapter, through trl.DPOTrainer (Rafailov et al. 2023, arXiv:2305.18290).

The reference log-probabilities come from the `reference` stage, so that no second model is in memory. What is logged:
rewards β·(log π − log π_ref) of both sides, their margin and accuracy, log-probabilities, and after every evaluation the
KL divergence to the reference over the tokens of held-out chosen answers.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from pyarrow import parquet
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig, DPOTrainer

from tasks import models, render, stage, training
from tasks.params import UserError

COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"]
COLLAPSE = 1.0  # nats per token: chosen answers this much less likely than under the reference are a collapse
ADAPTERS = ("default", "ref")  # policy and reference, as trl names them
KL_BATCH = 8  # pairs whose answers are compared at once, `models.SCORED` tokens of them over the whole vocabulary
TOLERANCE = 0.05  # nats per token between the reference's and the policy's log p at step 0; bf16 noise stays below


def run(
    base: Path, adapter: Path, pairs: Path, out: Path, plots: Path, metrics: Path,
    params: dict[str, Any], quantization: dict[str, Any] | None, seed: int,
) -> str:  # fmt: skip
    """Train a copy of `adapter` on `pairs` (output of `reference`) and save it to `out`; without pairs, the copy as it is.

    Raises:
        UserError: the reference is not this policy, or was computed in another precision; the loss is no number; chosen
            log-probabilities collapse.
    """
    if not parquet.read_metadata(pairs).num_rows:
        shutil.copytree(adapter, out, copy_function=shutil.copyfile, dirs_exist_ok=True)
        curve = (
            plots / "metrics/train/loss.tsv"
        )  # git keeps no empty folder, and without one `dvc` would run this again
        curve.parent.mkdir(parents=True, exist_ok=True)
        curve.write_text("step\tloss\n")
        metrics.write_text(json.dumps({"steps": 0}, indent=2) + "\n")
        return "no pairs: the SFT adapter as it is"
    check_precision(params)
    folder = training.checkpoint_folder(
        "dpo", [base, adapter, pairs], {"dpo": params, "quantization": quantization, "seed": seed}
    )
    table = Dataset.from_parquet(str(pairs), cache_dir=str(folder / "cache"), keep_in_memory=True)
    parts = {
        part: table.select([i for i, p in enumerate(table["part"]) if p == part]).select_columns(COLUMNS)
        for part in ("train", "validation")
    }
    validated = bool(len(parts["validation"]))
    given = training.arguments(params, seed, folder, validated)
    given |= {"max_length": None, "precompute_ref_log_probs": True, "remove_unused_columns": True}
    config = training.config(DPOConfig, "dpo", given)
    longest = max(len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in table)
    models.seed_everything(seed)
    model = models.load_adapter(models.load(base, quantization, models.attention(longest)), adapter, trainable=True)
    as_trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    watch = Watch(sum(map(len, parts["train"]["chosen_ids"])) / max(1, len(parts["train"])))
    trainer = CachedReferenceTrainer(
        model=model,
        args=config,
        train_dataset=parts["train"],
        eval_dataset=parts["validation"] if validated else None,
        processing_class=render.load_tokenizer(base),
        callbacks=[watch, training.Curves(plots), *training.early_stopping(params, validated)],
    )
    models.adapter_float32(trainer.model)
    # trl has rounded what is trained to bf16
    for name, parameter in trainer.model.named_parameters():
        if name in as_trained:
            parameter.data = as_trained[name].clone()
    check_reference(trainer)
    training.train(trainer, folder, params)
    models.save_adapter(trainer.model, out)
    result = training.summary(trainer, watch) | watch.last
    metrics.write_text(json.dumps(result, indent=2) + "\n")
    training.clear(folder)
    measured = (
        ("rewards_accuracies", "reward accuracy {:.2f}"),
        ("rewards_margins", "margin {:.2f}"),
        ("kl_to_reference", "KL to the reference {:.3f} nats per token"),
    )
    said = [text.format(result[name]) for name, text in measured if name in result]
    return ", ".join([f"{result['steps']} steps", *(said or ["nothing validated"])])


class CachedReferenceTrainer(DPOTrainer):
    """DPOTrainer on rows that are tokenised and carry the reference's log-probabilities already (trl 1.16)."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        self.log({"eval_kl_to_reference": self.kl_to_reference()})
        return metrics

    @torch.no_grad()
    def kl_to_reference(self, rows: int = 32) -> float:
        """Mean over tokens of KL(π ‖ π_ref), over the whole vocabulary, on held-out chosen answers; in nats."""
        assert self.eval_dataset is not None
        few = self.eval_dataset.select(range(min(rows, len(self.eval_dataset))))
        asked = [(row["prompt_ids"], row["chosen_ids"]) for row in few]
        total, tokens, was = 0.0, 0, self.model.training
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.eval()
        size = min(KL_BATCH, self.args.per_device_eval_batch_size)
        for group in models.batches([len(p) + len(a) for p, a in asked], size):
            part = [asked[i] for i in group]
            states = []
            for name in ADAPTERS:
                self.model.set_adapter(name)
                with self.accelerator.autocast():
                    before, head = models.before_head(self.model, part)
                states.append(torch.split(before, models.SCORED))
            for pieces in zip(*states, strict=True):  # all at once over a large vocabulary are gigabytes
                logps = []
                for name, piece in zip(ADAPTERS, pieces, strict=True):
                    self.model.set_adapter(name)  # the head may be adapted too
                    with self.accelerator.autocast():
                        logps.append(head(piece).float().log_softmax(-1))
                policy, reference = logps
                # a token at a time: one sum over all is cut up by the number of threads, and its last digits with it
                total += math.fsum((policy.exp() * (policy - reference)).sum(-1).tolist())
                tokens += len(policy)
        self.model.set_adapter("default")
        self.model.requires_grad_(False)  # set_adapter thawed each adapter in turn
        for parameter in trained:
            parameter.requires_grad_(True)
        self.model.train(was)
        return total / max(1, tokens)


def check_precision(given: dict[str, Any]) -> None:
    """Refuse a precision of the policy other than that in which the `reference` stage scores.

    Raises:
        UserError: naming the flag.
    """
    for key, value in training.precision().items():
        if given.get(key, value) != value:
            dtype = str(models.compute_dtype()).removeprefix("torch.")
            raise UserError(
                f"dpo.{key}: expected {str(value).lower()}, found {str(given[key]).lower()}: the reference's log-probabilities are computed in {dtype} here, and the policy's have to be"
            )


def check_reference(trainer: CachedReferenceTrainer) -> None:
    """Before the first step policy and reference are one model, so that every log-ratio is zero.

    Raises:
        UserError: they are not: the pairs were scored by another adapter or base.
    """
    rows = [trainer.train_dataset[i] for i in range(min(8, len(trainer.train_dataset)))]
    with torch.no_grad(), trainer.accelerator.autocast():
        scores = models.answer_logprobs(
            trainer.model.eval(), [(row["prompt_ids"], row["chosen_ids"]) for row in rows], 8
        )
    trainer.model.train()
    # of all rows together: noise of 16 bits in an answer of two tokens may be more than the tolerance
    apart = sum(abs(sum(s) - row["ref_chosen_logps"]) for s, row in zip(scores, rows, strict=True))
    off = apart / sum(map(len, scores))
    if not off <= TOLERANCE:  # NaN too
        raise UserError(
            f"the reference log-probabilities are not those of this policy: {off:.3f} nats per token apart before the first step; was the reference computed with another adapter or base?"
        )


class Watch(training.Watch):
    """Also: chosen log-probabilities collapsing, and a margin that stands still.

    Args:
        length: mean tokens of a chosen answer.
    """

    def __init__(self, length: float) -> None:
        super().__init__()
        self.length = length
        self.last: dict[str, float] = {}
        self.low = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **rest: Any,
    ) -> None:
        logs = logs or {}
        super().on_log(args, state, control, logs, **rest)
        for name in ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"):
            if f"eval_{name}" in logs:
                self.last[name.replace("/", "_")] = logs[f"eval_{name}"]
        if "eval_kl_to_reference" in logs:
            self.last["kl_to_reference"] = logs["eval_kl_to_reference"]
        if "rewards/chosen" in logs:
            ratio = logs["rewards/chosen"] / getattr(args, "beta", 1.0) / self.length
            self.low = self.low + 1 if ratio < -COLLAPSE else 0
            if self.low >= 2:
                raise UserError(
                    f"chosen log-probabilities collapse: {-ratio:.1f} nats per token below the reference at step {state.global_step}; lower dpo.learning_rate, raise dpo.beta, or add the sft loss (loss_type: [sigmoid, sft])"
                )
            if state.global_step == 1 and logs.get("loss") == 0:
                raise UserError(
                    "the loss is 0 at step 1: policy and reference can't be told apart from a finished run; is the adapter the SFT one?"
                )


if __name__ == "__main__":
    stage.main(run)
