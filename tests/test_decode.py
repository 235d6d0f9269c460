"""Answers in batches: exactly those of one row alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicLayer

from tasks import decode, fast, models, render


def _windowed(vocabulary: int) -> Any:
    """A random Mistral whose attention reaches 8 tokens back."""
    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, initializer_range=1.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def test_generation_in_batches_is_generation_alone(tiny: Path, tokenizer) -> None:
    model = models.load(tiny, None).float()
    prompts = [render.encode_prompt(tokenizer, [{"role": "user", "content": "thumb " * n}], None) for n in (1, 4, 9)]
    together = decode.generate(model, tokenizer, prompts, {}, 12, 3)
    alone = [decode.generate(model, tokenizer, [p], {}, 12, 1)[0] for p in prompts]
    assert together == alone
    assert decode.generate(model, tokenizer, prompts, {"repetition_penalty": 5.0}, 12, 3) != together


def test_a_model_may_end_its_turn_otherwise_than_a_text(tiny: Path, tokenizer) -> None:
    model = models.load(tiny, None).float()
    prompts = [render.encode_prompt(tokenizer, [{"role": "user", "content": "thumb"}], None)]
    (endless, _), *_ = decode.generate(model, tokenizer, prompts, {}, 12, 1)
    ids = tokenizer(endless, add_special_tokens=False)["input_ids"]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, ids[3]]
    (ended, cut), *_ = decode.generate(model, tokenizer, prompts, {}, 12, 1)
    assert not cut
    assert len(ended) < len(endless)
    assert endless.startswith(ended)


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("sampling", [{}, {"repetition_penalty": 1.3, "min_new_tokens": 3}])
def test_rows_that_ended_are_not_computed(tiny: Path, tokenizer, sampling: dict[str, Any], windowed: bool) -> None:
    model = _windowed(len(tokenizer)) if windowed else models.load(tiny, None).float()
    assert decode._droppable(model, sampling)
    prompts = [render.encode_prompt(tokenizer, [{"role": "user", "content": "thumb " * n}], None) for n in (1, 4, 9, 2)]
    ids = models.pad(prompts, tokenizer.pad_token_id, at=0)
    mask = models.pad([[1] * len(p) for p in prompts], 0, at=0)

    def answers(ends: list[int], own: bool) -> torch.Tensor:
        config = GenerationConfig(
            max_new_tokens=16, pad_token_id=tokenizer.pad_token_id, eos_token_id=ends, do_sample=False, **sampling
        )
        custom = None if own else decode.without_ended
        return model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, custom_generate=custom
        )[:, ids.shape[1] :]  # fmt: skip

    endless = answers([len(tokenizer) - 1], True)
    # each row ends at another token, the last one not at all
    ends = list({int(endless[row, place]) for row, place in ((0, 2), (1, 6), (2, 10))} - set(endless[3].tolist()))
    wanted = answers(ends, True)
    lengths = [next((i + 1 for i, t in enumerate(row) if t in ends), 16) for row in wanted.tolist()]
    assert len(set(lengths)) >= 2
    computed: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, given, __: computed.append(given[0].numel()))
    found = answers(ends, False)
    hook.remove()
    assert torch.equal(found, wanted)
    # all prompts, then each row until its last token is chosen
    assert sum(computed) == ids.numel() + sum(length - 1 for length in lengths)


def test_sampled_rows_follow_the_seed(tiny: Path, tokenizer) -> None:
    model = models.load(tiny, None).float()
    prompts = [render.encode_prompt(tokenizer, [{"role": "user", "content": "thumb"}], None)] * 3

    def sampled(seed: int) -> list[decode.Answer]:
        torch.manual_seed(seed)
        return decode.generate(model, tokenizer, prompts, {"do_sample": True}, 12, 3)

    assert sampled(1) == sampled(1) != sampled(2)
    assert len(set(sampled(1))) == 3


@pytest.mark.parametrize(
    ("windowed", "sampling", "shares"),
    [(False, {}, True), (False, {"no_repeat_ngram_size": 3}, False), (True, {}, False)],
)
def test_what_all_prompts_begin_with_is_computed_once(
    tiny: Path, tokenizer, monkeypatch: pytest.MonkeyPatch, windowed: bool, sampling: dict[str, Any], shares: bool
) -> None:
    model = _windowed(len(tokenizer)) if windowed else models.load(tiny, None).float()
    asked = ([{"role": "user", "content": text}] for text in ("thumb", "big thumb thumb", "kyphosis of the spine"))
    prompts = [render.encode_prompt(tokenizer, turns, "You explain clinical terms.") for turns in asked]
    opening = next(i for i, tokens in enumerate(zip(*prompts, strict=False)) if len({*tokens}) > 1)
    assert 5 < opening < min(map(len, prompts))

    def computed() -> tuple[list[decode.Answer], int]:
        seen: list[int] = []
        hook = model.get_input_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0].numel()))
        answers = decode.generate(model, tokenizer, prompts, sampling, 12, 3)
        hook.remove()
        return answers, sum(seen)

    found, fewer = computed()
    monkeypatch.setattr(decode, "_opening", lambda *_: 0)
    wanted, every = computed()
    assert found == wanted
    assert every - fewer == (2 * opening if shares else 0)


def test_few_rows_are_the_same_products(tiny: Path) -> None:
    model = models.load(tiny, None).float()
    layer = model.model.layers[0].mlp.up_proj
    layer.bias = torch.nn.Parameter(torch.randn(layer.out_features))
    plain = torch.nn.functional.linear
    with torch.no_grad(), decode.few_rows(model):
        for shape in ((1, 1), (5, 1), (3, 40), (3, 50)):
            x = torch.randn(*shape, layer.in_features)
            torch.testing.assert_close(layer(x), plain(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
        assert "forward" in vars(layer)
    assert "forward" not in vars(layer)


@pytest.mark.skipif(not fast.packs(torch.bfloat16), reason="a CPU whose oneDNN has no products in bf16")
def test_few_rows_in_16_bits_are_equal(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = models.load(tiny, None).to(torch.bfloat16)
    layers = [half.model.layers[0].mlp.down_proj, half.lm_head]
    layers[0].bias = torch.nn.Parameter(torch.randn(layers[0].out_features, dtype=torch.bfloat16))
    packed: list[int] = []
    real = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda x, *rest: packed.append(len(x)) or real(x, *rest))
    with torch.no_grad():
        for most in (fast.COPIES_MOST, 1):
            monkeypatch.setattr(fast, "COPIES_MOST", most)
            with decode.few_rows(half):
                for layer in layers:
                    for shape in ((1, 1), (5, 1), (3, 40), (3, 50)):
                        x = torch.randn(shape[0], 2 * shape[1], layer.in_features).bfloat16()[:, -shape[1] :]
                        wanted = torch.nn.functional.linear(x.contiguous(), layer.weight, layer.bias)
                        assert torch.equal(layer(x), wanted)
    assert packed == [5, 120] * 2  # of the model that is small enough


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_tokens_of_prompts_are_one_product_with_the_head(tiny: Path, dtype: torch.dtype) -> None:
    model = models.load(tiny, None).to(dtype)

    def batched() -> list[str]:
        """Products of batches that have the head's weight in them, once for each row."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            model.generate(input_ids=torch.full((4, 6), 5), attention_mask=torch.ones(4, 6), max_new_tokens=2)
        products = [event for event in profile.events() if event.name == "aten::bmm"]
        return [str(e.input_shapes) for e in products if any(model.vocab_size in shape for shape in e.input_shapes)]

    with decode.few_rows(model):
        assert not batched()
    assert batched()  # else torch or transformers do without, and so can `few_rows`


def test_a_cache_with_places_holds_what_one_without_does() -> None:
    torch.manual_seed(0)
    roomy, plain = decode.Roomy(), DynamicLayer()
    at: set[int] = set()

    def update(rows: int, tokens: int) -> None:
        new = torch.randn(rows, 2, tokens, 3), torch.randn(rows, 2, tokens, 3)
        for found, wanted in zip(roomy.update(*new), plain.update(*new), strict=True):
            assert torch.equal(found, wanted)
        assert roomy.get_seq_length() == plain.get_seq_length()
        at.add(roomy.keys.data_ptr())

    def both(name: str, argument: Any) -> None:
        for layer in (roomy, plain):
            getattr(layer, name)(argument)

    update(1, 5)
    both("batch_repeat_interleave", 4)
    update(4, 3)
    at.clear()
    for _ in range(decode.ROOM):
        update(4, 1)
    assert len(at) == 1  # nothing moved
    update(4, 1)
    both("batch_select_indices", torch.tensor([0, 3]))
    update(2, 1)
    both("crop", -2)
    update(2, decode.ROOM + 7)


@pytest.mark.parametrize(
    ("given", "own"),
    [
        ({}, False),
        ({"temperature": 0.7, "do_sample": True}, False),
        ({"num_beams": 2}, True),
        ({"use_cache": False}, True),
    ],
)
def test_what_needs_all_rows_keeps_them(
    tiny: Path, tokenizer, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], own: bool
) -> None:
    model = models.load(tiny, None)
    asked: list[Any] = []
    real = model.generate
    monkeypatch.setattr(model, "generate", lambda **named: asked.append(named.get("custom_generate")) or real(**named))
    decode.generate(model, tokenizer, [[3, 4, 5]], given, 4, 1)
    assert asked == [None if own else decode.without_ended]


def test_an_answer_without_an_end_is_cut(tiny: Path, tokenizer) -> None:
    model, end = models.load(tiny, None), tokenizer.eos_token_id
    prompts = [[3, 4, 5], [3, 4, 5, 6]]
    assert [cut for _, cut in decode.generate(model, tokenizer, prompts, {"suppress_tokens": [end]}, 5, 2)] == [
        True,
        True,
    ]
    forced = {"forced_eos_token_id": end}  # as the last token that there is room for
    assert [cut for _, cut in decode.generate(model, tokenizer, prompts, forced, 5, 2)] == [False, False]
