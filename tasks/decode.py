"""Answers of a model: greedy decoding and sampling in batches, as transformers' `generate` does it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tasks import fast, models, render

FEW_ROWS = 128  # up to so many, products are faster otherwise, see `few_rows`
ROOM = 64  # tokens that the cache has place for beyond those it holds
# settings of a `GenerationConfig` that treat each row by itself, or change nothing
ROW_BY_ROW = {
    "_from_model_config", "bad_words_ids", "bos_token_id", "do_sample", "eos_token_id", "epsilon_cutoff", "eta_cutoff",
    "max_length", "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size", "pad_token_id", "repetition_penalty",
    "sequence_bias", "suppress_tokens", "temperature", "top_k", "top_p", "transformers_version", "typical_p", "use_cache",
}  # fmt: skip


class Answer(NamedTuple):
    text: str  # without special tokens
    cut: bool  # no token that ends it among those allowed


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    generation: dict[str, Any],
    max_new_tokens: int,
    batch_size: int,
    progress: str | None = None,
) -> list[Answer]:
    """The model's answers to `prompts` (token ids), in their order. `generation` is a `GenerationConfig`."""
    from tqdm import tqdm

    ends = render.ends(model, tokenizer)
    config = GenerationConfig(
        **{"do_sample": False, **generation},
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends,
    )
    out = [Answer("", cut=False)] * len(prompts)
    groups = list(models.batches([len(p) for p in prompts], batch_size))
    own = _droppable(model, generation)
    with few_rows(model):
        for group in tqdm(groups, desc=progress, disable=progress is None, mininterval=2):
            rows = [prompts[i] for i in group]
            cache = _cache(model) if own else None
            opening = _opening(model, rows, generation, cache) if cache is not None else 0
            # `generate` counts positions without the padding
            ids = models.pad(rows, tokenizer.pad_token_id, at=opening)
            mask = models.pad([[1] * len(r) for r in rows], 0, at=opening)
            answers = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                **({"custom_generate": without_ended, "past_key_values": cache} if own else {}),
            )
            answers = answers[:, ids.shape[1] :]
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            ended = torch.isin(answers, torch.tensor(ends, device=answers.device)).any(-1).tolist()
            for index, text, whole in zip(group, texts, ended, strict=True):
                out[index] = Answer(text.strip(), cut=not whole)
    return out


class Roomy(DynamicLayer):
    """Keys and values `(rows, heads, tokens, width)` in tensors with place for more tokens.

    `DynamicLayer` of transformers 5.23 moves all of them for each new one: a tenth of the time of 64 answers.
    """

    keys: Any
    values: Any
    places: tuple[Tensor, ...] = ()  # whose first tokens `keys` and `values` are, unless these are tensors of their own

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        states = (key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if not self.places or after > self.places[0].shape[-2]:
            held = (self.keys, self.values)
            self.places = tuple(new.new_empty(*new.shape[:-2], after + ROOM, new.shape[-1]) for new in states)
            for place, old in zip(self.places if before else (), held, strict=False):
                place[..., :before, :] = old
        for place, new in zip(self.places, states, strict=True):
            place[..., before:after, :] = new
        keys, values = (place[..., :after, :] for place in self.places)
        self.keys, self.values = keys, values
        return keys, values

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.places = ()

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.places = ()


def _cache(model: Any) -> DynamicCache:
    """As `generate` makes it, with place."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [Roomy() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _opening(model: Any, rows: Sequence[Sequence[int]], generation: dict[str, Any], cache: DynamicCache) -> int:
    """How many tokens all rows begin with (the system message, mostly); their keys and values, computed once, go to `cache`.

    Not where the padding behind them would count: in a sliding window, or in sequences that may not be repeated.
    """
    repeats = (model.generation_config.to_diff_dict() | generation).get("no_repeat_ngram_size")
    most = min(map(len, rows)) - 1  # something is left to go on from
    shared = next((i for i, tokens in enumerate(zip(*rows, strict=False)) if len({*tokens}) > 1 or i == most), most)
    if len(rows) < 2 or shared < 1 or repeats or any(type(layer) is not Roomy for layer in cache.layers):
        return 0
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    inner.get_decoder()(input_ids=torch.tensor([rows[0][:shared]]), past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(rows))
    return shared


@contextlib.contextmanager
def few_rows(model: nn.Module) -> Iterator[None]:
    """Linear layers on a CPU multiply few rows in the way that is fastest there.

    In float32 as (W xᵀ)ᵀ, the same products summed in another order. All of SmolLM2-135M's layers with AVX2 and 2 threads,
    ms: 57 → 24 for 4 rows, 103 → 79 for 32, 157 → 143 for 64.

    In bf16 by a copy of W in the order in which oneDNN reads it, up to `fast.COPIES_MOST`. With AVX512-BF16 and 2 threads, ms:
    28 → 19 for 8 rows, 46 → 33 for 32, 61 → 50 for 64; what they come to is equal.

    Always as rows of one matrix: of the last tokens of prompts, which lie apart, torch 2.13's `linear` makes as many copies
    of W as there are prompts: of 64 before a head of 49,152 × 576, 3.4 GiB and 4 s.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear and m.weight.device.type == "cpu"]
    small = sum(layer.weight.nbytes for layer in layers) <= fast.COPIES_MOST

    def product(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        weight = layer.weight.detach()
        packs = small and weight.dtype == torch.bfloat16 and fast.packs(weight.dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), FEW_ROWS) if packs else None

        def forward(x: Tensor) -> Tensor:
            rows = x.reshape(-1, layer.in_features)
            few = 1 < len(rows) <= FEW_ROWS
            found: Tensor
            if few and packed is not None:
                found = torch.ops.mkldnn._linear_pointwise(rows, packed, layer.bias, "none", [], "")
            elif few and weight.dtype == torch.float32:
                found = (weight @ rows.T).T.contiguous()
                found = found if layer.bias is None else found + layer.bias
            else:
                found = nn.functional.linear(rows, weight, layer.bias)
            return found.view(*x.shape[:-1], -1)

        return forward

    try:
        for layer in layers:
            setattr(layer, "forward", product(layer))  # noqa: B010  (unknown to mypy as a variable)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def without_ended(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: Callable[..., Tensor],
    generation_config: GenerationConfig,
    **state: Any,
) -> Tensor:
    """Greedy decoding or sampling as `generate` does it, computing no row beyond its end; for its `custom_generate`.

    What it computes on a CPU grows with the rows, and `GenerationMixin._sample` (transformers 5.23, whose steps these are)
    takes all of them along until the last one ends.

    Returns:
        `(rows, tokens)`: prompts and answers, filled up with `pad_token_id`.
    """
    ended: list[tuple[int, Tensor]] = []
    rows = torch.arange(len(input_ids))
    outputs = model._prefill(input_ids, generation_config, state)
    while True:
        state = model._update_model_kwargs_for_generation(outputs, state)
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
        del outputs  # the first ones are of all tokens of the prompts
        scores = logits_processor(input_ids, logits)
        if generation_config.do_sample:
            chosen = torch.multinomial(scores.softmax(-1), 1)
        else:
            chosen = scores.argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, chosen], 1)
        if (stop := stopping_criteria(input_ids, None)).any():
            ended += zip(rows[stop].tolist(), input_ids[stop], strict=True)
            going = (~stop).nonzero()[:, 0]
            if not len(going):
                break
            state["past_key_values"].batch_select_indices(going)
            state |= {
                name: value[going]
                for name, value in state.items()
                if isinstance(value, Tensor) and len(value) == len(rows)
            }
            for processor in logits_processor:  # of the repetition penalty
                if isinstance(ignored := getattr(processor, "prompt_ignore_length", None), Tensor):
                    processor.prompt_ignore_length = ignored[going]
            rows, input_ids = rows[going], input_ids[going]
        outputs = model(
            **model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **state), return_dict=True
        )
    return models.pad(
        [ids.tolist() for _, ids in sorted(ended, key=lambda row: row[0])], int(generation_config.pad_token_id)
    )


def _droppable(model: Any, generation: dict[str, Any]) -> bool:
    """Rows can leave while `generate` runs: on a CPU, with such settings, out of such a cache."""
    given = model.generation_config.to_diff_dict() | generation
    settings = {name for name, value in given.items() if value not in (None, False)}
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    return (
        models.device().type == "cpu"
        and settings <= ROW_BY_ROW
        and given.get("use_cache", True)
        and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
    )
