"""Training and scoring of reforge beside TRL, on the same rows, as ratios measured in one run.

Every figure comes from a process of its own. The speed of a virtual machine changes within minutes, so systems take turns of a few
steps, the first of them not counted: of SFT all are there at once, which those of DPO and of 32 bits are too large for. They, the
products and the peers are there one after another, each in turn with reforge at its best (`BESIDE`), and a figure is the median of how many
times faster than reforge it was in a turn, times what reforge reached in all of them. What takes no turns (the
reference, answers, options) alternates as a whole (A B A B …), and its median is given.

TRL and the other peers have the allocator and the environment that they come with, but at their best tcmalloc and few compiled products
of oneDNN, which is what reforge sets for itself (`tasks`).

SmolLM2-135M with LoRA r 8 on all linear layers, batches of 4, loss on the completion only, in bf16; in float32 on a CPU that
has no products in bf16, where bf16 takes torch a hundred times longer. The first ten steps of a
run are not counted: memory is touched for the first time in them. Rows are made of the domain's definitions, of 60 to 146
tokens, 103 in the mean, 60 % of them completion.

- SFT in tokens per second that are no padding, DPO in pairs per second, the reference's log-probabilities in pairs per second.
- The products of a step alone, forward and backward, in the same units: of every token (of DPO the prompt once for both
  answers), and of those alone that are left where what rows of a batch begin with is computed once, by packed weights.
- The same with the operations between them: attention's own products, norms, rotations, activations, sums and softmaxes, each
  as one of torch's functions on memory that is there: what is left to gain without writing kernels.
- Answers in prompts per second, greedy, of 32 new tokens each: in batches as `evaluate` asks, against transformers' own
  `generate`, of as many and of one at a time.
- Options in prompts per second: log-likelihood of four answers to one question, scored together against one at a time.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from ctypes.util import find_library
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent
BASE = ROOT / "data/base/model"
TCMALLOC = find_library("tcmalloc_minimal")  # by name: the loader knows where it is
RANK = 8
LORA = {"r": RANK, "lora_alpha": 16, "target_modules": "all-linear"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
# rows or pairs a step; steps that are not counted, in which memory is touched for the first time: one turn of long and short
# rows where they are grouped by length
BATCH, WARM = 4, 10
CPUINFO = Path("/proc/cpuinfo")
BF16 = CPUINFO.is_file() and "avx512_bf16" in CPUINFO.read_text()  # `models.compute_dtype`, without torch
DTYPE, BITS = ("bf16", "16-bit") if BF16 else ("fp32", "32-bit")
PAGE = ROOT / f"docs/benchmarks{'' if BF16 else '-float32'}.md"
DEFAULTS = f"TRL, its defaults{'' if BF16 else ' but for bf16'}"

TURN = "@turn "  # a process says this when its next steps wait, and after it how its last ones were
PATIENCE = 3600.0  # seconds that a process may take for what it is asked before it is taken for one that hangs
BESIDE = f"reforge, {BITS}, packed, tcmalloc"
TOGETHER = ("sft",) if BF16 else ()  # works whose processes fit into memory beside one another; none do in 32 bits
# of the others, work → what `BESIDE` does meanwhile
ONE_BY_ONE = {"sft": "sft", "dpo": "dpo", "products": "sft", "products-dpo": "dpo"}
# oneDNN's own, for peers as they come
KEPT_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}
ONCE = "what rows share once, packed weights, tcmalloc"
REST = "the same, and the operations between them"

# work → system → settings of the process that does it; the first system is reforge, the last is TRL as it comes
GROUPED = {"train_sampling_strategy": "group_by_length"}
FASTEST: dict[str, Any] = {"train": {"pack_weights": True}, "tcmalloc": True}
# without being asked for it reforge packs in bf16 alone
LEAN: dict[str, dict[str, Any]] = {
    f"reforge, {BITS}, not packed": {"train": {"pack_weights": False}},
    "reforge, NF4, not packed": {"quantization": NF4, "train": {"pack_weights": False}},
} if BF16 else {}  # fmt: skip
LEAST: dict[str, Any] = {"shared": True, "pack": True, "tcmalloc": True}
BEST = {"weights": DTYPE, "trl": {"gradient_checkpointing": False}}
SYSTEMS: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {
        f"reforge, {BITS}": {"reforge": GROUPED},
        "reforge, NF4": {"quantization": NF4, "reforge": GROUPED},
        **{name: {"reforge": GROUPED, **lean} for name, lean in LEAN.items()},
        f"reforge, {BITS}, packed, tcmalloc": {"reforge": GROUPED, **FASTEST},
        "reforge, NF4, packed, tcmalloc": {"quantization": NF4, "reforge": GROUPED, **FASTEST},
        f"TRL, {DTYPE} weights, no checkpointing": BEST,
        "TRL, the same, by length, tcmalloc": {
            "weights": DTYPE, "tcmalloc": True, "trl": {"gradient_checkpointing": False, **GROUPED},
        },
        "TRL, the same, padding-free, by length, tcmalloc": {
            "weights": DTYPE, "tcmalloc": True,
            "trl": {"gradient_checkpointing": False, "padding_free": True, **GROUPED},
        },
        "TRL, NF4, no checkpointing": {"weights": DTYPE, "quantization": NF4, "trl": {"gradient_checkpointing": False}},
        DEFAULTS: {"weights": "fp32", "trl": {}},
    },
    "dpo": {
        f"reforge, {BITS}": {},
        "reforge, NF4": {"quantization": NF4},
        **LEAN,
        f"reforge, {BITS}, packed, tcmalloc": FASTEST,
        "reforge, NF4, packed, tcmalloc": {"quantization": NF4, **FASTEST},
        f"TRL, {DTYPE} weights, no checkpointing": BEST,
        "TRL, the same, reference cached, tcmalloc": {
            "weights": DTYPE, "tcmalloc": True,
            "trl": {"gradient_checkpointing": False, "precompute_ref_log_probs": True},
        },
        DEFAULTS: {"weights": "fp32", "trl": {}},
    },
    "reference": {
        "reforge": {},
        "TRL, precompute_ref_log_probs": {"weights": DTYPE, "trl": {}},
    },
    "products": {"every token": {}, ONCE: LEAST, REST: {**LEAST, "rest": True}},
    "products-dpo": {
        "every token": {"pairs": True}, ONCE: {**LEAST, "pairs": True}, REST: {**LEAST, "pairs": True, "rest": True},
    },
    "answers": {"reforge": {}, "transformers, 64 at a time": {"trl": {}, "batch": 64}, "one at a time": {"trl": {}, "batch": 1}},
    "options": {"reforge": {}, "one at a time": {"trl": {}}},
}  # fmt: skip
# where bf16 is slow, TRL as it comes takes minutes for a step: by itself, and few of them
SLOW: dict[str, dict[str, dict[str, Any]]] = {
    f"{what}-bf16": {"TRL, its defaults": {"weights": "fp32", "trl": {"bf16": True}, "warm": 1, "steps": 2}}
    for what in ("sft", "dpo")
    if not BF16
}
SYSTEMS |= SLOW
UNITS = {
    "sft": "tokens/s", "dpo": "pairs/s", "reference": "pairs/s", "products": "tokens/s", "products-dpo": "pairs/s", "answers": "prompts/s", "options": "prompts/s",
    "sft-bf16": "tokens/s", "dpo-bf16": "pairs/s",
}  # fmt: skip


def rows(count: int = 160) -> list[dict[str, list[int]]]:
    """`prompt_ids`, `chosen_ids`, `rejected_ids` of so many pairs; each answer ends as an answer does."""
    import polars as pl

    from tasks import render

    tokenizer = render.load_tokenizer(BASE)
    table = pl.read_parquet(ROOT / "data/ingest/records.parquet").filter(kind="chat", task="definition")
    texts = [turns[-1]["content"] for turns in table.unique("term", maintain_order=True)["messages"]]
    draw = random.Random(0)
    eos = int(tokenizer.eos_token_id)

    def some(tokens: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < tokens:
            ids += tokenizer(f" {draw.choice(texts)}", add_special_tokens=False)["input_ids"]
        return ids[:tokens]

    out = []
    for _ in range(count):
        length = draw.randint(60, 146)
        answer = round(0.6 * length)
        bare = len(render.encode_prompt(tokenizer, [{"role": "user", "content": ""}], None))
        asked = tokenizer.decode(some(max(1, length - answer - bare)))
        prompt = render.encode_prompt(tokenizer, [{"role": "user", "content": asked}], None)
        other = some(max(2, round(answer * draw.uniform(0.7, 1.3))))
        out.append(
            {
                "prompt_ids": prompt,
                "chosen_ids": [*some(answer - 1), eos],
                "rejected_ids": [*other[:-1], eos],
            }
        )
    return out


# --- one measured process --------------------------------------------------------------------------------------------


def work(what: str, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """One system at one work; `rate` in the unit of the work, `peak` in bytes, of a training also its first `loss`."""
    from tasks import stage

    how = {
        "sft": _sft, "dpo": _dpo, "reference": _reference, "products": _products, "products-dpo": _products, "answers": _answers, "options": _options,
        "sft-bf16": _sft, "dpo-bf16": _dpo,
    }  # fmt: skip
    found = how[what](settings, settings.get("steps", steps))
    return found | {"peak": stage.peak_bytes()}


def _model(settings: dict[str, Any]) -> Any:
    """With an adapter; as reforge makes it, or in the precision that was asked for."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from tasks import models

    if "trl" not in settings:
        return models.new_adapter(models.load(BASE, settings.get("quantization"), models.attention(200)), LORA, 0)
    quantized = {}
    if given := settings.get("quantization"):
        quantized["quantization_config"] = BitsAndBytesConfig(**given, bnb_4bit_compute_dtype=models.compute_dtype())
    dtype = torch.bfloat16 if settings["weights"] == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype, **quantized)
    models.seed_everything(0)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))


def _wait(seconds: float, tokens: float, steps: int) -> None:
    """Say how the last turn was, and wait for the next one."""
    print(f"{TURN}{json.dumps({'seconds': seconds, 'tokens': tokens, 'steps': steps})}", flush=True)
    sys.stdin.readline()


def _clock(settings: dict[str, Any]) -> Any:
    """A callback that notes how long each step took and how many tokens it had; for each `turn` of so many steps it waits."""
    from transformers import TrainerCallback

    warm, turn = settings.get("warm", WARM), settings.get("turn", 0)

    class Clock(TrainerCallback):
        trainer: Any = None
        steps: list[tuple[float, float]]

        def turn(self) -> None:
            done = len(self.steps) - warm
            if turn and done >= 0 and done % turn == 0:
                last = self.steps[warm:][1 - turn :]
                _wait(sum(seconds for seconds, _ in last), sum(tokens for _, tokens in last), len(last))
            self.began, self.before = time.perf_counter(), float(self.trainer._total_train_tokens)

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.steps = []
            self.turn()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            done = float(self.trainer._total_train_tokens) - self.before
            self.steps.append((time.perf_counter() - self.began, done))
            self.turn()

        def rate(self, each: float | None) -> float:
            """Tokens per second after the first steps, or `each` per step."""
            counted = self.steps[warm:]
            done = each * len(counted) if each else sum(tokens for _, tokens in counted)
            return done / sum(seconds for seconds, _ in counted)

    return Clock()


def _arguments(settings: dict[str, Any], steps: int, folder: str) -> dict[str, Any]:
    own: dict[str, Any] = {
        "per_device_train_batch_size": BATCH,
        "max_steps": steps + settings.get("warm", WARM),
        "learning_rate": 2e-4,
        "logging_steps": 1,
    }
    if "trl" not in settings:
        from tasks import training

        own |= {"gradient_checkpointing": False, "save_strategy": "no"} | settings.get("reforge", {})
        return training.arguments(own, 0, Path(folder), False) | {"max_length": None}
    theirs: dict[str, Any] = settings["trl"]
    return own | theirs | {
        "output_dir": folder, "use_cpu": True, "bf16": theirs.get("bf16", BF16), "report_to": "none", "save_strategy": "no", "seed": 0,
        "max_length": None, "dataloader_pin_memory": False,
    }  # fmt: skip


def _trained(trainer: Any, clock: Any, settings: dict[str, Any], each: float | None) -> dict[str, Any]:
    from tasks import training

    clock.trainer = trainer
    if "trl" in settings:
        trainer.train()
    else:
        training.train(trainer, Path(trainer.args.output_dir), settings.get("train", {}))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"rate": clock.rate(each), "loss": losses[0]}


def _sft(settings: dict[str, Any], steps: int) -> dict[str, Any]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tasks import render

    data = [
        {
            "input_ids": row["prompt_ids"] + row["chosen_ids"],
            "labels": [render.IGNORED] * len(row["prompt_ids"]) + row["chosen_ids"],
        }
        for row in rows()
    ]
    clock = _clock(settings)
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(settings, steps, folder)
        trainer = SFTTrainer(
            model=_model(settings),
            args=SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=Dataset.from_list(data),
            processing_class=render.load_tokenizer(BASE),
            callbacks=[clock],
        )
        return _trained(trainer, clock, settings, None)


def _tokenised() -> Any:
    """TRL's own trainer but for its tokenizing: it gets the same tokens."""
    from trl import DPOTrainer

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    return Tokenised


def _dpo(settings: dict[str, Any], steps: int) -> dict[str, Any]:
    from datasets import Dataset
    from trl import DPOConfig

    from tasks import render
    from tasks.dpo import CachedReferenceTrainer

    data: list[dict[str, Any]] = list(rows())
    clock, kind, model = _clock(settings), _tokenised(), _model(settings)
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(settings, steps, folder)
        if "trl" not in settings:
            kind = CachedReferenceTrainer
            arguments |= {"precompute_ref_log_probs": True}
            chosen, rejected = _scored(model, data)  # as `reference` has done by then: not counted
            data = [
                row | {"ref_chosen_logps": sum(c), "ref_rejected_logps": sum(r)}
                for row, c, r in zip(data, chosen, rejected, strict=True)
            ]
        trainer = kind(
            model=model,
            args=DPOConfig(**arguments),
            train_dataset=Dataset.from_list(data),
            processing_class=render.load_tokenizer(BASE),
            callbacks=[clock],
        )
        return _trained(trainer, clock, settings, BATCH)


def _scored(model: Any, data: list[dict[str, Any]]) -> tuple[list[list[float]], list[list[float]]]:
    """log p of the tokens of each chosen and each rejected answer, as the stage `reference` has them."""
    import torch

    from tasks import models

    asked = [(row["prompt_ids"], row[f"{side}_ids"]) for row in data for side in ("chosen", "rejected")]
    with torch.autocast("cpu", models.compute_dtype(), enabled=models.compute_dtype() != torch.float32):
        scores = models.answer_logprobs(model.eval(), asked, 32)
    return scores[::2], scores[1::2]


def _reference(settings: dict[str, Any], steps: int) -> dict[str, Any]:
    from datasets import Dataset
    from trl import DPOConfig

    from tasks import render

    data: list[dict[str, Any]] = [*rows()[: BATCH * steps]]
    if "trl" not in settings:
        model = _model(settings)
        _scored(model, data[:BATCH])
        began = time.perf_counter()
        _scored(model, data)
        return {"rate": len(data) / (time.perf_counter() - began)}
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(settings, steps, folder)
        trainer = _tokenised()(
            model=_model(settings),
            args=DPOConfig(**arguments),
            train_dataset=Dataset.from_list(data),
            processing_class=render.load_tokenizer(BASE),
        )
        few = Dataset.from_list(data[:BATCH])
        trainer._precompute_ref_logps(few, "warm", BATCH)
        began = time.perf_counter()
        trainer._precompute_ref_logps(trainer.train_dataset, "train", BATCH)
        return {"rate": len(data) / (time.perf_counter() - began)}


def _products(settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """y = xWᵀ and dx = dyW of every frozen matrix, the adapter's thin ones, and both of the head on the completions."""
    import torch
    from transformers import AutoConfig

    from tasks import fast, models

    config = AutoConfig.from_pretrained(BASE)
    width, inner, rank = config.hidden_size, config.intermediate_size, RANK
    keys = width // config.num_attention_heads * config.num_key_value_heads
    # outputs of the matrices that share an input: q, k, v; o; gate, up; down
    groups = ((width, (width, keys, keys)), (width, (width,)), (width, (inner, inner)), (inner, (width,)))
    pairs = settings.get("pairs", False)
    every, shared, answered, counted = _counts(pairs)
    tokens = round(shared if settings.get("shared") else every)

    def random_(*shape: int) -> Any:
        return torch.randn(*shape, dtype=models.compute_dtype())

    def frozen(o: int, i: int) -> fast._Frozen:
        weight = random_(o, i)
        return fast._Frozen(lambda _: weight, settings.get("pack", False))

    def matrices(i: int, outs: tuple[int, ...]) -> tuple[Any, ...]:
        ranks = len(outs) * rank  # what shares an input is multiplied by all their A at once
        each = [(random_(tokens, o), frozen(o, i), random_(o, rank), random_(rank, tokens)) for o in outs]
        return random_(tokens, i), random_(ranks, i), random_(ranks, tokens), each

    # each layer its own, as in a step: those of one layer alone would stay in the cache
    layers = [[matrices(*group) for group in groups] for _ in range(config.num_hidden_layers)]
    answers, head = random_(round(answered), width), frozen(config.vocab_size, width)

    def step() -> None:
        for layer in layers:
            for x, a, low, each in layer:
                fast.few_times(a, x.t()), low.t() @ a, low @ x
                for dy, weight, b, part in each:
                    weight.times(x, None).addmm_(part.t(), b.t()), weight.back(dy)
                    fast.few_times(b.t(), dy.t()), part @ dy
            if rest:
                rest()
        logits = head.times(answers, None)
        if rest:
            for few in torch.split(logits, fast.HEAD_PIECE // config.vocab_size):
                few.copy_(torch.softmax(few.float(), -1))
        head.back(logits)

    rest = _between(config, tokens, BATCH * (1 + pairs)) if settings.get("rest") else None
    fast.keep_pages()
    step()
    last: tuple[float, float, int] = 0.0, 0.0, 0
    for _ in range(steps // settings["turn"]):
        _wait(*last)
        step()
        began = time.perf_counter()
        for _ in range(settings["turn"] - 1):
            step()
        last = time.perf_counter() - began, counted * (settings["turn"] - 1), settings["turn"] - 1
    _wait(*last)
    return {}


def _between(config: Any, tokens: int, count: int) -> Any:
    """What a layer does between its products, forward and backward, of `count` rows that leave so many tokens."""
    import torch
    from torch.nn import functional

    from tasks import models

    def random_(*shape: int) -> Any:
        return torch.randn(*shape, dtype=models.compute_dtype())

    heads, few, size = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.hidden_size // config.num_attention_heads,
    )
    longest = round(statistics.mean(len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in rows()))
    group, queries = heads // few, tokens // count
    q, k = random_(count * few, group * queries, size), random_(count * few, longest, size)
    x, weight, inner = (
        random_(tokens, config.hidden_size),
        random_(config.hidden_size),
        random_(tokens, config.intermediate_size),
    )
    turned, angle = [random_(tokens, n, size) for n in (heads, few)], random_(tokens, 1, size)

    def layer() -> None:
        weights = torch.softmax(q @ k.transpose(1, 2), -1)
        weights @ k
        weights.transpose(1, 2) @ q
        inner_ = torch._softmax_backward_data(q @ k.transpose(1, 2), weights, -1, q.dtype)
        inner_ @ k, inner_.transpose(1, 2) @ q
        for states in turned * 2:  # rotated, and turned back
            torch.addcmul(states * angle, states, angle)
        for _ in range(2):
            functional.rms_norm(x, weight.shape, weight), x + x
            torch.addcmul(x * weight, x, x), x + x
        functional.silu(inner) * inner
        inner * inner, torch.ops.aten.silu_backward(inner * inner, inner)

    return layer


def _counts(pairs: bool) -> tuple[float, float, float, float]:
    """Tokens of a batch, those left if what its rows begin with stands once, those of its answers, and those of its rows; means.

    A prompt counts once for the two answers of a pair, in the first too; in the last twice, as trainers count.
    """
    from tasks import fast

    found, made = [], rows()
    sides = ("chosen_ids", "rejected_ids")[: 1 + pairs]
    for start in range(0, len(made), BATCH):
        batch = made[start : start + BATCH]
        answered = sum(len(row[side]) for row in batch for side in sides)
        layout = fast.lay_out([row["prompt_ids"] + row[side] for row in batch for side in sides])
        asked = sum(len(row["prompt_ids"]) for row in batch)
        found.append((answered + asked, layout.ids.numel(), answered, answered + len(sides) * asked))
    every, shared, answered, counted = (statistics.mean(counts) for counts in zip(*found, strict=True))
    return every, shared, answered, counted


def _answers(settings: dict[str, Any], steps: int) -> dict[str, Any]:
    from tasks import decode, models, render

    model, tokenizer = models.load(BASE, None), render.load_tokenizer(BASE)
    size = settings.get("batch", 64)
    prompts = [row["prompt_ids"] for row in rows()[: 8 if size == 1 else 64]]
    forced: dict[str, Any] = {"min_new_tokens": 32}  # all do the same work

    def answer(prompts: list[list[int]]) -> None:
        if "trl" not in settings:
            decode.generate(model, tokenizer, prompts, forced, 32, size)
            return
        for group in models.batches([len(prompt) for prompt in prompts], size):
            asked = [prompts[i] for i in group]
            model.generate(
                input_ids=models.pad(asked, tokenizer.pad_token_id, at=0),
                attention_mask=models.pad([[1] * len(prompt) for prompt in asked], 0, at=0),
                max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id, **forced,
            )  # fmt: skip

    answer(prompts[:1])
    began = time.perf_counter()
    answer(prompts)
    return {"rate": len(prompts) / (time.perf_counter() - began)}


def _options(settings: dict[str, Any], steps: int) -> dict[str, Any]:
    import torch

    from tasks import models

    model = models.load(BASE, None)
    made = rows()
    asked = [
        (row["prompt_ids"], option[key][:16])
        for row, other in zip(made[:32], made[32:64], strict=True)
        for option in (row, other)
        for key in ("chosen_ids", "rejected_ids")
    ]
    with torch.no_grad():
        if "trl" not in settings:
            models.answer_logprobs(model, asked[:4], 4)
            began = time.perf_counter()
            models.answer_logprobs(model, asked, 64)
        else:
            models.token_logits(model, asked[:1])
            began = time.perf_counter()
            for one in asked:
                models.token_logits(model, [one])[0].log_softmax(-1)
    return {"rate": len(asked) / 4 / (time.perf_counter() - began)}


# --- all of them, in turn --------------------------------------------------------------------------------------------


def preload_tcmalloc() -> dict[str, str]:
    """The environment that preloads it.

    Raises:
        SystemExit: it is not here; its row would be that of another allocator.
    """
    if TCMALLOC is None:
        raise SystemExit("bench: libtcmalloc_minimal is not here: `apt-get install libtcmalloc-minimal4`")
    return {"LD_PRELOAD": TCMALLOC}


class Process:
    """One system at one work; where it takes turns, it has come to its first one when this is made.

    Args:
        what, name: of the work and the system, for errors.
        command: its program; `arguments` go to `Popen`.
        turns: it takes turns.

    Raises:
        SystemExit: it fails, or does not come to its next turn, or to its end, within `PATIENCE`.
    """

    def __init__(self, what: str, name: str, command: list[str], *, turns: bool = True, **arguments: Any) -> None:
        self.what, self.name = what, name
        self.said: list[str] = []
        self.turns: list[dict[str, float]] = []
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed below)
        self.process = subprocess.Popen(  # noqa: S603
            command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            start_new_session=True, **arguments,
        )  # fmt: skip
        if turns:
            try:
                self._until_turn()
            except BaseException:
                self.__exit__()  # nobody has it yet
                raise
            self.turns.clear()  # nothing was counted yet

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self.process.communicate()
        self.errors.close()

    def turn(self) -> None:
        """Its next steps."""
        self._write()
        self._until_turn()

    def rates(self, each: bool) -> list[float]:
        """Of each turn so far: rows or pairs a second (`each`), or tokens."""
        return [(BATCH * turn["steps"] if each else turn["tokens"]) / turn["seconds"] for turn in self.turns]

    def result(self) -> dict[str, Any]:
        """What `work` found."""
        self._write()
        assert self.process.stdout is not None
        with self._patience():
            self.said += self.process.stdout
            failed = self.process.wait()
        if failed:
            self._fail()
        found: dict[str, Any] = json.loads(self.said[-1])
        return found

    def _kill(self) -> None:
        """End it and what it started, which may hold its output open."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _write(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def _until_turn(self) -> None:
        assert self.process.stdout is not None
        with self._patience():
            for line in self.process.stdout:
                if TURN in line:
                    self.turns.append(json.loads(line.rpartition(TURN)[2]))
                    return
                self.said.append(line)
            self.process.wait()
        self._fail()

    @contextmanager
    def _patience(self) -> Iterator[None]:
        """End the process if what is done within lasts longer than `PATIENCE`; a reader of its output then comes to the end."""

        def end() -> None:
            self.said.append(f"ended after {PATIENCE:g} s without an answer\n")
            self._kill()

        timer = threading.Timer(PATIENCE, end)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _fail(self) -> NoReturn:
        self.errors.seek(0)
        raise SystemExit(f"bench: {self.what}, {self.name}:\n{''.join(self.said)}{self.errors.read()}")


def start(what: str, name: str, steps: int, turn: int = 0) -> Process:
    """A process of `SYSTEMS`, for so many steps in turns of `turn`; 0: in one go."""
    settings = SYSTEMS[what][name] | ({"turn": turn} if turn else {})
    given = json.dumps({"what": what, "settings": settings, "steps": steps})
    added = preload_tcmalloc() if settings.get("tcmalloc") else KEPT_PRODUCTS if "trl" in settings else {}
    return Process(
        what, name, [sys.executable, "-m", "bench.training", given], turns=bool(turn), cwd=ROOT, env=os.environ | added
    )


def beside(anchor: Process, other: Process, rounds: int) -> list[float]:
    """How many times faster `other` was than `anchor`, in each of `rounds` turns of both, which have just been started.

    So rows that are grouped by length are as long in both. In tokens, of pairs too, whose order differs from one to the other.
    """
    for _ in range(rounds):
        anchor.turn()
        other.turn()
    return [b / a for a, b in zip(anchor.rates(False), other.rates(False), strict=True)]


def measure(what: str, rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """System → medians of `rate`, `peak` and `loss` over the rounds.

    Raises:
        SystemExit: a system fails, or is measured with tcmalloc, which is not here.
    """
    if what in TOGETHER or what in ONE_BY_ONE:
        preload_tcmalloc()
    each, turn = UNITS[what] == "pairs/s", 1 + steps
    found: dict[str, dict[str, float]] = {}
    if what in TOGETHER:
        with ExitStack() as stack:
            running = {n: stack.enter_context(start(what, n, rounds * turn, turn)) for n in SYSTEMS[what]}
            for _ in range(rounds):
                for process in running.values():
                    process.turn()
            for name, process in running.items():
                found[name] = process.result() | {"rate": statistics.median(process.rates(each))}
    elif what in ONE_BY_ONE:
        reached: list[float] = []
        for name in (name for name in SYSTEMS[what] if name != BESIDE):
            with (
                start(ONE_BY_ONE[what], BESIDE, rounds * turn, turn) as anchor,
                start(what, name, rounds * turn, turn) as process,
            ):
                ratio = statistics.median(beside(anchor, process, rounds))
                reached += anchor.rates(each)
                found[name] = process.result() | {"rate": ratio}
                found[BESIDE] = anchor.result() | {"rate": 1.0}
            print(f"{what}: {name}: {ratio:.3g} times {BESIDE}", file=sys.stderr, flush=True)
        found = {
            name: found[name] | {"rate": found[name]["rate"] * statistics.median(reached)}
            for name in dict.fromkeys([*SYSTEMS[what], BESIDE])
        }
    else:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in SYSTEMS[what]}
        for _ in range(rounds):
            for name in runs:
                with start(what, name, steps) as process:
                    runs[name].append(process.result())
        found = {name: {key: statistics.median(run[key] for run in of) for key in of[0]} for name, of in runs.items()}
    for name, figures in found.items():
        print(f"{what}: {name}: {figures['rate']:.3g} {UNITS[what]}", file=sys.stderr, flush=True)
    return found


def table(what: str, found: dict[str, dict[str, float]]) -> str:
    """As Markdown; ratios are to the last system, TRL's defaults or one at a time."""
    trained = all("loss" in figures for figures in found.values())
    *_, last = found.values()
    lines = [
        f"| {what} | {UNITS[what]} | × the last row | peak, GiB |{' first loss |' if trained else ''}",
        f"| --- | --- | --- | --- |{' --- |' if trained else ''}",
    ]
    for name, figures in found.items():
        line = (
            f"| {name} | {figures['rate']:.3g} | {figures['rate'] / last['rate']:.2f} | {figures['peak'] / 2**30:.2f} |"
        )
        lines.append(line + (f" {figures['loss']:.4f} |" if trained else ""))
    return "\n".join(lines)


if __name__ == "__main__":  # one process of `measure`
    one = json.loads(sys.argv[1])
    print(json.dumps(work(one["what"], one["settings"], one["steps"])))
