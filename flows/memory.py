"""How much memory a stage that loads a model needs, part by part, from the model's facts and params.yaml; loads no torch.

Bytes of a part follow from shapes and from what the code keeps (`tasks/fast.py`, peft's and transformers' own forward
passes); a few constants of the process were measured, see docs/plan.md. A Llama-like decoder is assumed: two norms, grouped
attention and a gated MLP in each layer; others are approximated by it. GPU figures are computed and were never measured.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tasks import weights

MIB = 1 << 20
GIB = 1 << 30
# What `tasks.fast` packs, by the class in facts.json (there by model type).
PACKABLE = {f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")}
NO_LORA: dict[str, Any] = {"target_modules": []}
SHARED_INPUT = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
# `HEAD_CHUNK` of tasks.fast in elements; `HEAD_PIECE`, and bytes of each of these: a logit in 32 bits and a probability
FAST_HEAD, FAST_PIECE, FAST_PIECE_BYTES = 1 << 24, 1 << 20, 8
# `SCORE_CHUNK` of tasks.fast; bytes of an attention score, with its weight in 16 and 32 bits, in the forward pass
FAST_SCORES, FAST_SCORES_BYTES = 1 << 25, 12
FAST_KEPT = 1 << 21  # `KEPT_SCORES` of tasks.fast
COPIES_MOST = 1 << 30  # of tasks.fast: bytes of packed weights, up to which there are some unasked
ROOM = 64  # of tasks.decode: tokens beyond those in the cache
SCORED = 1024  # of tasks.models: tokens whose logits are held at once where rows are not packed
# trl's tile (tokens, vocabulary); bytes of an element with Triton (the gradient in place), and with torch operations
# (trl/kernels/chunked_logprob.py, `_backward_tile`)
TILE, TILE_BYTES, TILE_BYTES_TORCH = (4096, 32768), 2, 31
# bytes kept by torch.optim or bitsandbytes for each trained weight; any other optimizer is taken for AdamW
OPTIMIZER = {"adamw": 8.0, "adam": 8.0, "lion": 4.0, "sgd": 0.0, "adafactor": 4.0, "rmsprop": 4.0, "ademamix": 12.0}
# Measured on 2 cores with torch 2.13.0, see docs/plan.md.
PROCESS = 631 * MIB  # resident after imports (565), and the libraries that the first step brings in (66)
SLACK = 180 * MIB  # what the allocator holds beyond what is in use, after loading and quantising
# activations of one layer that its backward pass and the holes in the heap take, which `fast.keep_pages` never gives back;
# without a backward pass there are as many holes, see docs/plan.md
HELD = 6.0
# oneDNN's compiled products: for each new batch shape, and for all that it keeps (`tasks.ENVIRONMENT`)
KERNELS, KERNELS_MOST = 20 * MIB, 96 * MIB
# NVIDIA's context and PyTorch's caching allocator: a usual allowance, not measured
CONTEXT, GPU_HOLES = 500 * MIB, 0.1

Kind = Literal["cpu", "cuda", "mps"]


@dataclass(frozen=True)
class Device:
    """What models run on: `total` and `free` bytes of it; `bf16`: products in 16 bits; `ram`: free bytes of the machine's own
    memory beside a GPU, None if it is not known."""

    kind: Kind
    name: str
    total: int
    free: int
    bf16: bool = True
    ram: int | None = None

    @property
    def width(self) -> int:
        """Bytes of a number in which the model computes, `models.compute_dtype`."""
        return 4 if self.kind == "cpu" and not self.bf16 else 2


@dataclass(frozen=True)
class Part:
    """`mapped`: pages of a file, which the kernel takes back before it runs out of memory."""

    name: str
    bytes: int
    mapped: bool = False


@dataclass(frozen=True)
class Need:
    """The peak of a stage as a sum of parts; `note` says what the estimate rests on; `aside`: on a GPU, what waits in the
    machine's own memory."""

    parts: tuple[Part, ...]
    note: str = ""
    aside: tuple[Part, ...] = ()

    @property
    def total(self) -> int:
        """Resident memory at the peak, which is what an event's `peak_bytes` measures."""
        return sum(part.bytes for part in self.parts)

    @property
    def least(self) -> int:
        """What must be there for it to run."""
        return sum(part.bytes for part in self.parts if not part.mapped)


@dataclass(frozen=True)
class Batch:
    """Tokens that one step works on.

    Attributes:
        tokens: laid end to end, equal beginnings once, as tasks.fast does.
        padded: as a rectangle, as transformers does.
        longest: tokens of the longest row.
        shapes: how many different batches a run has, at most; each has products of its own compiled.
    """

    tokens: int
    padded: int
    longest: int
    shapes: int = 1_000_000


def targeted(facts: dict[str, Any], lora: dict[str, Any]) -> list[tuple[str, int, int, int]]:
    """(name, in, out, count) of the layers that `lora.target_modules` names; a pattern is taken for all of them."""
    wanted = lora.get("target_modules", "all-linear")
    names = facts["linear_modules"] if isinstance(wanted, str) else {str(name).rsplit(".", 1)[-1] for name in wanted}
    return [
        (name, width, out, count)
        for name, shapes in facts["linear_shapes"].items()
        for width, out, count in shapes
        if name in names
    ]


def adapter_parameters(facts: dict[str, Any], lora: dict[str, Any]) -> int:
    """A is `(r, in)`, B is `(out, r)`, for each targeted layer (Hu et al. 2021, arXiv:2106.09685)."""
    rank = int(lora.get("r", 8))
    return sum(rank * (width + out) * count for _, width, out, count in targeted(facts, lora))


def weight_bytes(facts: dict[str, Any], quantization: dict[str, Any] | None, width: int = 2) -> int:
    """Bytes of the loaded weights: quantised linear layers, everything else (embeddings, head, norms) in `width`."""
    rest: int = width * (facts["parameters"] - facts["linear_parameters"])
    return rest + linear_bytes(facts, quantization, width)


def linear_bytes(facts: dict[str, Any], quantization: dict[str, Any] | None, width: int = 2) -> int:
    """4 bits: `weights.nf4_bytes`. 8 bits: a byte, and a 32-bit scale for each row."""
    total = 0
    for shapes in facts["linear_shapes"].values():
        for inner, out, count in shapes:
            n = inner * out
            if not quantization:
                each = width * n
            elif quantization.get("load_in_8bit"):
                each = n + 4 * out
            else:
                each = weights.nf4_bytes(n, quantization.get("bnb_4bit_use_double_quant", False))
            total += each * count
    return total


def optimizer_bytes(name: str, parameters: int) -> int:
    """State of `optim` for so many trained float32 weights. Paged ones are counted too: they page out only when they must."""
    family = next((f for f in sorted(OPTIMIZER, key=len, reverse=True) if f in name), "adamw")
    eight = "8bit" in name or "4bit" in name
    return math.ceil(OPTIMIZER[family] * parameters * (0.25 if eight else 1))


def packable(facts: dict[str, Any], device: Device, given: dict[str, Any]) -> bool:
    """`fast.install` packs rows of this model in this training."""
    return device.kind == "cpu" and bool(given.get("fast", True)) and facts["architecture"] in PACKABLE


def kept_per_token(
    facts: dict[str, Any], lora: dict[str, Any], device: Device, longest: int, packed: bool, fused: bool
) -> float:
    """Bytes that all layers together keep for the backward pass, for each token, without gradient checkpointing.

    Args:
        longest: tokens of a row; `eager` attention keeps a weight for each of them.
        packed: rows and attention as in tasks.fast.
        fused: LoRA layers as in tasks.fast.
    """
    w, layers, hidden = device.width, facts["layers"], facts["hidden_size"]
    shape = facts["attention"]
    query, key = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    norms = (
        2 * (w * hidden + 4) if packed else 2 * 4 * hidden
    )  # the input of each; in float32 where it is the model's own
    mlp = 3 * w * (facts["intermediate_size"] or 4 * hidden)  # gate, its activation, up
    if packed:
        attention = w * (query + 2 * key)
    elif device.kind == "cpu" and longest <= 512:  # `models.attention`: eager, keys and values repeated for each head
        score = 4 if w == 4 else w + 4  # softmax in float32, and a copy where that is not the model's
        attention = w * 3 * query + score * shape["heads"] * longest
    else:
        attention = w * 4 * query
    inputs: dict[str, int] = {}
    rank = 0
    for name, inner, _, count in targeted(facts, lora):
        shared = fused or w == 4  # in float32 no layer casts its input to a copy of its own
        group = SHARED_INPUT.get(name, name) if shared else name
        if shared:
            inputs[group] = max(inputs.get(group, 0), inner * count)
        else:
            inputs[group] = inputs.get(group, 0) + inner * count
        rank += int(lora.get("r", 8)) * count
    dropout = sum(inputs.values()) if lora.get("lora_dropout") else 0  # a byte of mask for each
    # the norm before the head keeps its input too; that of the first layer does not, since nothing before it is trained
    return float(layers * (norms + mlp + attention) + w * (sum(inputs.values()) + rank) + dropout)


def checkpointed_per_token(facts: dict[str, Any], device: Device, packed: bool) -> int:
    """The same with gradient checkpointing: each layer's input, and that of the last norm, in float32 if it is the model's."""
    last = device.width * facts["hidden_size"] + 4 if packed else 4 * facts["hidden_size"]
    return int(facts["layers"] * device.width * facts["hidden_size"] + last)


def kept_scores(facts: dict[str, Any], device: Device, batch: Batch) -> int:
    """Bytes of attention weights that all layers together keep for the backward pass in tasks.fast: of small batches only."""
    scores = batch.padded // max(1, batch.longest) * facts["attention"]["heads"] * batch.longest**2
    return int(facts["layers"] * device.width * scores) if scores <= FAST_KEPT else 0


def training(
    facts: dict[str, Any],
    section: dict[str, Any],
    lora: dict[str, Any],
    quantization: dict[str, Any] | None,
    device: Device,
    batch: Batch,
    evaluated: Batch | None = None,
    *,
    copies: int = 0,
    kl: int = 0,
) -> Need:
    """The peak of `sft` or `dpo`.

    Args:
        section: `sft` or `dpo` of params.yaml, with the libraries' defaults filled in.
        evaluated: a batch of the validation, where nothing is kept.
        copies: adapters beside the trained one (dpo: the reference).
        kl: answer tokens that `dpo` compares at once, over the whole vocabulary in pieces of `SCORED`.
    """
    kl = min(kl, SCORED)
    packed = packable(facts, device, section)
    fusable = not (quantization or {}).get("load_in_8bit") and not lora.get("lora_dropout")
    fused = packed and fusable
    tokens = batch.tokens if packed and not lora.get("lora_dropout") else batch.padded
    trained = adapter_parameters(facts, lora)
    kept = kept_per_token(facts, lora, device, batch.longest, packed, fused) * tokens
    kept += kept_scores(facts, device, batch) if packed else 0
    layer = kept / facts["layers"]
    if section.get("gradient_checkpointing", True):
        name = f"activations of {tokens:,} tokens, one layer at a time"
        kept = checkpointed_per_token(facts, device, packed) * tokens + layer
    else:
        name = f"activations of {tokens:,} tokens"
    casts = device.width * trained if device.width < 4 else 0  # 16-bit copies of A and B, one of each a step
    head = head_bytes(facts, device, tokens, packed)
    scores = score_bytes(facts, batch) if packed else 0
    passing = max(HELD * layer + scores, head) if device.kind == "cpu" else layer + scores + head
    step = kept + passing
    rest = 0.0
    if evaluated:
        count = evaluated.tokens if packed else evaluated.padded
        once = kept_per_token(facts, lora, device, evaluated.longest, packed, fused) * count / facts["layers"]
        rest = once + head_bytes(facts, device, count, packed) + (score_bytes(facts, evaluated) if packed else 0)
    # five float32 tables: both models, a difference, an exponential, a product
    tables = 20 * kl * facts["vocabulary"]
    rest = max(rest, tables) if device.kind != "cpu" else rest
    parts = [
        *loaded(facts, quantization, device, batch.shapes),
        Part(f"adapter, {trained / 1e6:.1f} M × float32" + (f", and {copies} copy" if copies else ""), 4 * trained * (1 + copies)),
        Part("gradients, float32", 4 * trained),
        Part(f"optimizer {section['optim']}", optimizer_bytes(section["optim"], trained)),
        Part(name, int(kept + casts)),
        Part("one layer's backward pass with its holes, or the head", int(passing)),
        *([Part("holes between activations", int(GPU_HOLES * kept))] if device.kind != "cpu" else []),
    ]  # fmt: skip
    if device.kind == "cpu" and section.get("fast", True):
        doubled = packed_bytes(facts, lora if fusable else NO_LORA, device, packed)
        unasked = section.get("pack_weights") is None and device.width == 2 and doubled <= COPIES_MOST
        if doubled and (unasked or section.get("pack_weights")):
            parts.append(Part("packed copies of the frozen weights", doubled))
    if tables and device.kind == "cpu":  # blocks so large find no hole, and come on top
        parts.append(Part(f"KL to the reference, {kl:,} tokens over the vocabulary", tables))
    if rest > step:
        parts.append(Part("validation beyond a step", int(rest - step)))
    return Need(tuple(parts))


def packed_bytes(facts: dict[str, Any], lora: dict[str, Any], device: Device, head: bool) -> int:
    """Of `pack_weights`: two copies of each adapted layer, and of the `head` where rows are packed, in what is computed in."""
    layers = sum(width * out * count for _, width, out, count in targeted(facts, lora))
    return 2 * device.width * int(layers + head * facts["vocabulary"] * facts["hidden_size"])


def score_bytes(facts: dict[str, Any], batch: Batch) -> int:
    """Scores of one layer's attention in tasks.fast: of few rows at a time or of few queries of a long one, `FAST_SCORES` at most."""
    rows = batch.padded // max(1, batch.longest)
    return int(min(rows * facts["attention"]["heads"] * batch.longest**2, FAST_SCORES)) * FAST_SCORES_BYTES


def head_bytes(facts: dict[str, Any], device: Device, tokens: int, packed: bool) -> int:
    """Logits held at once: rows of the vocabulary in pieces, never all of them."""
    vocabulary = int(facts["vocabulary"])
    if packed:
        logits = tokens * vocabulary
        return min(logits, FAST_HEAD) * device.width + min(logits, FAST_PIECE) * FAST_PIECE_BYTES
    each = TILE_BYTES if device.kind == "cuda" else TILE_BYTES_TORCH
    return min(tokens, TILE[0]) * min(vocabulary, TILE[1]) * each


def process(device: Device, shapes: int = 1_000_000) -> list[Part]:
    """What is there without a model."""
    if device.kind != "cpu":
        return [Part("CUDA context", CONTEXT)]
    parts = [Part("Python, torch and libraries", PROCESS + SLACK)]
    if device.width == 2:  # oneDNN's; those in float32 are MKL's
        parts.append(Part("compiled products", min(KERNELS * shapes, KERNELS_MOST)))
    return parts


def loaded(
    facts: dict[str, Any], quantization: dict[str, Any] | None, device: Device, shapes: int = 1_000_000
) -> list[Part]:
    """The process and the model in it. On a CPU safetensors maps the file: weights in 16 bits are its pages."""
    name = "weights, " + quantised(quantization, device.width)
    beside = process(device, shapes)
    if device.kind != "cpu":
        return [*beside, Part(name, weight_bytes(facts, quantization))]
    if device.width == 2 and not quantization:
        return [*beside, Part(f"{name}, pages of the model's file", weight_bytes(facts, None))]
    if quantization:  # of the file, `models.load` keeps nothing
        parts = [Part(name, weight_bytes(facts, quantization, device.width))]
        if quantization.get("load_in_4bit"):
            parts.append(Part("the largest weight, dequantised", device.width * largest(facts)))
        return [*beside, *parts]
    mapped = Part("model file, mapped", 2 * facts["parameters"], mapped=True)
    return [*beside, mapped, Part(name, weight_bytes(facts, None, 4))]


def quantised(quantization: dict[str, Any] | None, width: int = 2) -> str:
    """`quantization` in a word."""
    if not quantization:
        return f"{8 * width} bits"
    if quantization.get("load_in_8bit"):
        return "int8"
    double = " twice quantised" if quantization.get("bnb_4bit_use_double_quant") else ""
    return f"{quantization.get('bnb_4bit_quant_type', 'fp4')}{double}"


def merging(facts: dict[str, Any], quantization: dict[str, Any] | None, device: Device) -> list[Part]:
    """`models.load_merged`: the model in 16 bits, the quantised one beside it, and one layer at a time in float32."""
    parts = [Part("merged model, 16 bits", 2 * facts["parameters"])]
    if quantization:
        parts.append(
            Part(f"weights, {quantised(quantization, device.width)}", weight_bytes(facts, quantization, device.width))
        )
    return [*parts, Part("the largest layer in float32, a copy and what is added", 12 * largest(facts))]


def merged(facts: dict[str, Any], device: Device) -> Part:
    """A merged model as it computes."""
    return Part(f"merged model, {8 * device.width} bits", device.width * facts["parameters"])


def largest(facts: dict[str, Any]) -> int:
    """Weights of the largest linear layer."""
    return int(max(inner * out for shapes in facts["linear_shapes"].values() for inner, out, _ in shapes))


def generating(facts: dict[str, Any], device: Device, batch: int, prompt: int, new: int) -> list[Part]:
    """KV cache of `batch` rows of prompt and answer, one layer of their prompts, and the logits of one position each.

    On a CPU the cache has place for more, and a small model in 16 bits has a copy of its linear layers.
    """
    length, tokens, w = prompt + new + ROOM * (device.kind == "cpu"), batch * prompt, device.width
    hidden, shape = facts["hidden_size"], facts["attention"]
    linear = facts["linear_parameters"] + facts["vocabulary"] * hidden
    copied = device.kind == "cpu" and w == 2 and w * linear <= COPIES_MOST
    # what is alive at once: a layer's input, its norm in float32, and the MLP or the attention
    most = max(3 * (facts["intermediate_size"] or 4 * hidden), 4 * shape["heads"] * shape["head_dim"])
    layer = (w * hidden + 4 * hidden + w * most) * tokens
    return [
        Part(f"one layer of {tokens:,} tokens of prompts", layer),
        Part(f"KV cache, {batch} × {length} tokens", facts["kv_cache_bytes_per_token"] * w // 2 * batch * length),
        Part("logits", 6 * batch * facts["vocabulary"]),
        *([Part("packed copies of the linear layers", w * linear)] if copied else []),
    ]


def scoring(
    facts: dict[str, Any], lora: dict[str, Any], device: Device, batch: Batch, answer: int, rows: int
) -> list[Part]:
    """One layer of one batch without gradients, and the logits of the answers, `answer` tokens in each of `rows`."""
    packed = packable(facts, device, {})
    tokens = batch.tokens if packed else batch.padded
    layer = kept_per_token(facts, lora, device, batch.longest, packed, packed) * tokens / facts["layers"]
    held = HELD if device.kind == "cpu" else 1.0
    every = 10 * min(rows * answer, SCORED) * facts["vocabulary"]  # in 16 and 32 bits, and their log-softmax
    head = head_bytes(facts, device, rows * answer, True) if packed else every
    return [
        Part(f"one layer of {tokens:,} tokens{', with holes' * (held > 1)}", int(held * layer)),
        Part("logits", int(head)),
    ]


def distinct(rows: Iterable[Sequence[int]]) -> int:
    """Tokens of these rows end to end, equal beginnings once: what `fast.lay_out` makes of a batch."""
    total, before = 0, ()  # type: int, Sequence[int]
    for row in sorted(map(tuple, rows)):
        shared = next(
            (i for i, (a, b) in enumerate(zip(before, row, strict=False)) if a != b), min(len(before), len(row))
        )
        total += len(row) - shared
        before = row
    return total
