"""The faster paths give what the plain ones give: losses, log-probabilities and every LoRA gradient."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from tasks import fast

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama, tied, with biases": lambda: LlamaConfig(
        **SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "mistral, window of 5": lambda: MistralConfig(**SIZES, sliding_window=5),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2, window of 4 in one layer": lambda: Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32),
}
# (token ids, where the labels begin): shared beginnings, a row that begins another, two equal rows, one on its own
ROWS = [
    ([5, 6, 7, 8, 9, 10, 11], 4),
    ([5, 6, 7, 8, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32], 4),
    ([40, 41, 42], 1),
    ([5, 6, 7, 8, 9, 10, 11, 12, 13], 2),
    ([5, 6, 7, 8, 9, 10, 11], 4),
    ([5, 6, 50, 51, 52, 53], 3),
]


def tiny(config: Any, tmp_path: Path | None = None, **lora: Any) -> Any:
    """A random model with LoRA on all linear layers and B not zero, ready for `fused_lm_head=True`; NF4 with `tmp_path`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    if tmp_path is not None:
        model.save_pretrained(tmp_path)
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, quantization_config=nf4, attn_implementation="eager"
        )
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)
    adapted: Any = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | lora)
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    add_fused_lm_head(
        adapted.get_base_model(), outputs=("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    )
    return adapted.train()


def batch(rows: list[tuple[list[int], int]] = ROWS) -> dict[str, Tensor]:
    width = max(len(ids) for ids, _ in rows)
    every = [(ids, [-100] * start + ids[start:], [1] * len(ids)) for ids, start in rows]
    padded = [[r[k] + [fill] * (width - len(r[0])) for r in every] for k, fill in enumerate((0, -100, 0))]
    return dict(zip(("input_ids", "labels", "attention_mask"), map(torch.tensor, padded), strict=True))


def plain(model: Any, given: dict[str, Tensor]) -> Tensor:
    """log p of each label `(batch, seq - 1)`, 0 where there is none, through peft, eager attention and full logits."""
    logits = model(input_ids=given["input_ids"], attention_mask=given.get("attention_mask")).logits.float()[:, :-1]
    labels = given["labels"][:, 1:]
    picked = torch.log_softmax(logits, -1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return picked * (labels != -100)


def fused(model: Any, given: dict[str, Tensor]) -> Tensor:
    out: Tensor = model(**given, fused_lm_head=True, use_cache=False).log_probs
    return out


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(loss)
    out = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all(g.abs().sum() > 0 for g in out.values())
    return out


def distance(a: Tensor, b: Tensor) -> float:
    """Of `a` to `b`, relative to `b`."""
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def same(model: Any, score: Callable[[Any], Tensor], reference: Callable[[Any], Tensor], **options: Any) -> None:
    """`score` on the installed model against `reference` on the plain one: values and every gradient within 1e-5."""
    expected = reference(model)
    torch.manual_seed(1)
    weights = torch.rand(expected.shape)  # every position has its own gradient
    wanted = gradients(model, (expected * weights).sum())
    notes = fast.install(model, **options)
    assert notes == []
    given = score(model)
    assert distance(given, expected) < 1e-5
    found = gradients(model, (given * weights).sum())
    fast.uninstall(model)
    assert found.keys() == wanted.keys()
    assert {name: d for name in wanted if (d := distance(found[name], wanted[name])) > 1e-5} == {}


@pytest.mark.parametrize("config", CONFIGS)
def test_log_probabilities_and_gradients(config: str) -> None:
    given = batch()
    same(tiny(CONFIGS[config]()), lambda m: fused(m, given), lambda m: plain(m, given))


@pytest.mark.parametrize("pack", [False, True])
def test_nf4(tmp_path: Path, pack: bool) -> None:
    given = batch()
    same(tiny(CONFIGS["llama"](), tmp_path), lambda m: fused(m, given), lambda m: plain(m, given), pack=pack)


@pytest.mark.skipif(not fast.packs(torch.bfloat16), reason="a CPU whose oneDNN has no products in bf16")
@pytest.mark.parametrize(("out", "width"), [(192, 576), (1536, 576), (576, 1536)])
def test_packed_products_are_equal_to_the_bit_in_bf16(out: int, width: int) -> None:
    """In a real model's shapes, for batches of any length after the first, so that they can be packed unasked."""
    weight = torch.randn(out, width).bfloat16()
    plain, packed = (fast._Frozen(lambda _: weight, pack) for pack in (False, True))
    for tokens in (300, 5, 64, 661, 1024):
        x, grad, dx = (torch.randn(tokens, n).bfloat16() for n in (width, out, width))
        assert torch.equal(packed.times(x, None), plain.times(x, None))
        assert torch.equal(packed.back(grad), plain.back(grad))
        assert torch.equal(packed.back(grad, dx.clone()), plain.back(grad, dx.clone()))


def test_packing_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 up to so many bytes of copies: two of each adapted layer and of the head."""
    monkeypatch.setattr(fast, "packs", lambda dtype: True)
    model = tiny(CONFIGS["qwen3"]())
    layers = [m.get_base_layer() for m in model.modules() if isinstance(m, LoraLayer)]
    copies = 4 * sum(layer.weight.numel() for layer in [*layers, model.get_base_model().lm_head])
    for most, worth in ((copies, True), (copies - 1, False)):
        monkeypatch.setattr(fast, "COPIES_MOST", most)
        assert fast.worth_packing(model, torch.bfloat16) == worth
        assert not fast.worth_packing(model, torch.float32)  # there they change bits, and are twice as large
    monkeypatch.setattr(fast, "packs", lambda dtype: False)
    monkeypatch.setattr(fast, "COPIES_MOST", copies)
    assert not fast.worth_packing(model, torch.bfloat16)


@pytest.mark.parametrize("config", CONFIGS)
def test_packed_weights(config: str) -> None:
    """As exact, with biases too, for batches of any length after the one they were packed at."""
    given = batch()
    same(tiny(CONFIGS[config]()), lambda m: fused(m, given), lambda m: plain(m, given), pack=True)
    model = tiny(CONFIGS[config]())
    expected = [plain(model, batch(ROWS[:count])) for count in (1, len(ROWS), 2)]
    fast.install(model, pack=True)
    for count, wanted in zip((1, len(ROWS), 2), expected, strict=True):
        assert distance(fused(model, batch(ROWS[:count])), wanted) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_products_of_a_packed_weight(dtype: torch.dtype) -> None:
    """Two copies, made at the first product; the same products, and their sums, as of the weight itself."""
    if not fast.packs(dtype):
        pytest.skip(f"oneDNN has no packed weights in {dtype} on this CPU")
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 32).to(dtype), torch.randn(48).to(dtype)
    asked: list[torch.dtype] = []

    def source(wanted: torch.dtype) -> Tensor:
        asked.append(wanted)
        return weight.to(wanted)

    frozen = [fast._Frozen(source, pack) for pack in (True, False)]
    for tokens in (7, 3, 20):
        x, grad, dx = (torch.randn(tokens, width).to(dtype) for width in (32, 48, 32))
        turned = grad.t().contiguous().t()
        found, wanted = (
            (f.times(x, None), f.times(x, bias), f.back(grad), f.back(turned), f.back(grad, dx.clone())) for f in frozen
        )
        for one, other in zip(found, wanted, strict=True):
            assert distance(one, other) < (1e-5 if dtype == torch.float32 else 2**-7)
    assert frozen[0].packed is not None
    assert all(copy.is_mkldnn and copy.dtype == dtype for copy in frozen[0].packed[1:])
    assert frozen[1].packed is None
    assert len(asked) == 1 + 3 * 5  # packed: once


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("shape", "blocksize"), [((48, 64), 64), ((5, 96), 32), ((3, 8192), 4096), ((70, 7), 64)])
def test_four_bits_are_dequantised_as_bitsandbytes_does(
    dtype: torch.dtype, kind: str, nested: bool, shape: tuple[int, int], blocksize: int
) -> None:
    """To the bit: by its kernel into one space, whose contents last until the next weight, or else by its own function."""
    torch.manual_seed(0)
    space = fast._Space()
    weights = [quantize_4bit(torch.randn(shape, dtype=dtype), None, None, blocksize, nested, kind) for _ in range(2)]
    places = set()
    for packed, state in weights:
        found = space.dequantize(packed, state)
        assert torch.equal(found, dequantize_4bit(packed, state))
        places.add(found.data_ptr())
    covered = blocksize <= 1024 and shape[1] % 2 == 0
    assert space.held.numel() == (shape[0] * shape[1] if covered else 0)
    assert not covered or places == {space.held.data_ptr()}


@pytest.mark.parametrize("config", ["llama", "mistral, window of 5"])
@pytest.mark.parametrize("scores", [1, 300, 1200], ids=["a query at a time", "a few queries", "rows"])
@pytest.mark.parametrize("kept", [0, 1 << 20])
def test_in_pieces(monkeypatch: pytest.MonkeyPatch, config: str, scores: int, kept: int) -> None:
    """Attention of few rows or, of long ones, of few queries, its weights kept or computed again."""
    monkeypatch.setattr(fast, "KEPT_SCORES", kept)
    monkeypatch.setattr(fast, "KEPT_BIAS", kept)
    monkeypatch.setattr(fast, "SCORE_CHUNK", scores)
    given = batch()
    same(tiny(CONFIGS[config]()), lambda m: fused(m, given), lambda m: plain(m, given))


@pytest.mark.parametrize(("chunk", "piece"), [(1, 1), (5, 1), (5, 2), (100, 7)])
def test_head_in_pieces(monkeypatch: pytest.MonkeyPatch, chunk: int, piece: int) -> None:
    """Positions whose logits are held at once, and of these those that are in float32: the last ones may be fewer."""
    monkeypatch.setattr(fast, "HEAD_CHUNK", chunk * VOCABULARY)
    monkeypatch.setattr(fast, "HEAD_PIECE", piece * VOCABULARY)
    given = batch()
    same(tiny(CONFIGS["llama"]()), lambda m: fused(m, given), lambda m: plain(m, given))
    model = tiny(CONFIGS["llama"]())
    expected = model(**given, fused_lm_head=True, use_cache=False)
    fast.install(model)
    found = model(**given, fused_lm_head=True, use_cache=False)
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"):
        torch.testing.assert_close(found[name], expected[name], msg=name, atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that anything gave."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in tensors)])
        return out


def test_scores_of_a_long_row_are_never_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "KEPT_SCORES", 0)
    monkeypatch.setattr(fast, "SCORE_CHUNK", 8_000)
    rows = [[1, 2, *range(10, 90)], [1, 2, *range(20, 110)], [7, 8]]  # 4 heads × 92² scores are 33,856
    layout = fast.lay_out(rows)
    drawn = (torch.randn(layout.ids.shape[1], heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
    given = [x.requires_grad_() for x in drawn]
    with Largest() as largest:
        out = fast._apply(fast._Attention, *given, layout, 0.5, None)
        found = torch.autograd.grad(out.square().sum(), given)
    assert 4_000 < largest.elements <= 8_000
    monkeypatch.undo()
    whole = fast._apply(fast._Attention, *given, layout, 0.5, None)
    torch.testing.assert_close(out, whole)
    for one, other in zip(found, torch.autograd.grad(whole.square().sum(), given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # sums over pieces are in float32


@pytest.mark.parametrize("config", CONFIGS)
def test_no_mask_of_all_tokens_by_all_tokens_is_made(monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    """transformers 5.23 takes positions that restart for packed rows, and builds one, which this attention never reads."""

    def made(**_: Any) -> None:
        raise AssertionError("a mask was made")

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, fast.ATTENTION, made)
    model, given = tiny(CONFIGS[config]()), batch()
    fast.install(model)
    fused(model, given).sum().backward()
    fast.packed_logps(model, [([5, 6, 7], [8, 9]), ([5, 6], [9])])


def test_a_window_behind_a_long_beginning_that_rows_share() -> None:
    """Beyond the end of the second row, shorter than the first without what they share, no key is within the window."""
    shared = list(range(5, 25))
    given = batch([([*shared, *range(40, 48)], 4), ([*shared, *range(60, 75)], 4)])
    same(tiny(CONFIGS["mistral, window of 5"]()), lambda m: fused(m, given), lambda m: plain(m, given))


def test_only_some_layers() -> None:
    """q without k, up without gate: a group is what there is of it."""
    given = batch()
    same(
        tiny(CONFIGS["qwen2"](), target_modules=["q_proj", "v_proj", "up_proj"]),
        lambda m: fused(m, given),
        lambda m: plain(m, given),
    )


def test_gradient_checkpointing() -> None:
    model, given = tiny(CONFIGS["llama"]()), batch()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    same(model, lambda m: fused(m, given), lambda m: plain(m, given))


def test_rows_padded_on_the_left() -> None:
    model, given = tiny(CONFIGS["llama"]()), batch()
    length = given["attention_mask"].sum(1)
    left = {k: torch.stack([row.roll(-int(n)) for row, n in zip(v, length, strict=True)]) for k, v in given.items()}
    fast.install(model)
    right = fused(model, given)
    for b, row in enumerate(fused(model, left)):
        torch.testing.assert_close(row[-(int(length[b]) - 1) :], right[b, : int(length[b]) - 1])


def test_packed_by_trl() -> None:
    """Rows that trl's collator laid end to end: the same values as padded rows, in its layout."""
    model, given = tiny(CONFIGS["llama"]()), batch()
    examples = [{"input_ids": ids, "labels": [-100] * start + ids[start:]} for ids, start in ROWS]
    packed = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=16)(examples)
    expected = plain(model, given)
    fast.install(model)
    found = fused(model, packed)
    torch.testing.assert_close(found[found != 0], expected[expected != 0])


def test_rows_do_not_leak() -> None:
    """A row scores the same alone as among others; the gradient of its score is the same too."""
    model, given = tiny(CONFIGS["llama"]()), batch()
    fast.install(model)
    together = fused(model, given)
    for b in range(len(ROWS)):
        alone = fused(model, {k: v[b : b + 1] for k, v in given.items()})
        assert distance(alone[0], together[b]) < 1e-5
        expected = gradients(model, alone.sum())
        found = gradients(model, fused(model, given)[b].sum())
        assert max(distance(found[name], expected[name]) for name in expected) < 1e-5


def test_a_change_in_one_row_changes_no_other() -> None:
    model, given = tiny(CONFIGS["llama"]()), batch()
    fast.install(model)
    before = fused(model, given)
    given["input_ids"][1, 0] = 60  # it now shares nothing with the rest
    after = fused(model, given)
    others = [0, 2, 3, 4, 5]
    torch.testing.assert_close(after[others], before[others])
    assert not torch.allclose(after[1], before[1])


def test_equal_beginnings_are_computed_once() -> None:
    layout = fast.lay_out([ids for ids, _ in ROWS])
    assert layout.ids.shape[1] == len({tuple(ids[: i + 1]) for ids, _ in ROWS for i in range(len(ids))})
    for (ids, _), places in zip(ROWS, layout.places, strict=True):
        assert layout.ids[0, places].tolist() == ids
        assert layout.positions[0, places].tolist() == list(range(len(ids)))
    assert fast.lay_out([ids for ids, _ in ROWS], share=False).ids.shape == (1, sum(len(ids) for ids, _ in ROWS))


def test_every_output_of_the_head() -> None:
    """Entropy and the rest, as trl's own head gives them."""
    model, given = tiny(CONFIGS["llama"]()), batch()
    expected = model(**given, fused_lm_head=True, use_cache=False)
    fast.install(model)
    found = model(**given, fused_lm_head=True, use_cache=False)
    for name in ("loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask"):
        torch.testing.assert_close(found[name], expected[name], msg=name, atol=1e-5, rtol=1e-5)


def test_the_first_of_equal_logits_is_the_most_likely() -> None:
    """As argmax has it, in trl too: 16-bit logits are often equal."""
    hidden, weight = torch.eye(4), torch.tensor([[1.0, 0, 3, 0], [1, 0, 3, 2], [0, 1, 3, 2], [1, 1, 0, 2]])
    head = fast._Frozen(weight.to, False)
    *_, top1 = fast._LogProbs.apply(hidden.repeat(4, 1), head, 4, None, torch.arange(4).repeat_interleave(4))
    best = (hidden @ weight.t()).argmax(-1)
    assert top1.tolist() == [bool(best[i] == target) for target in range(4) for i in range(4)]
    assert top1.sum() == 4


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_norms(kind: str) -> None:
    """Values and gradients, in 16 bits as near to float32 as the model's own."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(64, 1e-5).requires_grad_(False)
    nn.init.uniform_(norm.weight, 0.5, 2)
    shape = (1, 7, 64) if kind == "llama" else (1, 7, 3, 64)
    x, grad = torch.randn(shape), torch.randn(shape)

    def run(forward: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        norm.to(dtype)
        given = x.to(dtype).requires_grad_()
        out = forward(given)
        return out, torch.autograd.grad(out, given, grad.to(dtype))[0]

    norm.weight.data = norm.weight.bfloat16().float()
    exact = run(norm.forward, torch.float32)
    for own, found in zip(exact, run(fast._FusedNorm(norm), torch.float32), strict=True):
        assert distance(found, own) < 1e-6
    for own, ours, right in zip(
        run(norm.forward, torch.bfloat16), run(fast._FusedNorm(norm), torch.bfloat16), exact, strict=True
    ):
        assert distance(ours, right) < 1.2 * distance(own, right)


def test_no_labels_at_all() -> None:
    model, given = tiny(CONFIGS["llama"]()), batch()
    given["labels"].fill_(-100)
    fast.install(model)
    out = model(**given, fused_lm_head=True, use_cache=False)
    assert out.loss == 0
    out.loss.backward()


def test_packed_logps() -> None:
    """Per-token log p of chosen and rejected answers, their prompt computed once, against padded rows on their own."""
    pairs = [
        ([5, 6, 7], [8, 9, 10, 11]),
        ([5, 6, 7], [30, 31]),
        ([5, 60, 61, 62], [8]),
        ([5, 60, 61, 62], [70, 71, 72]),
    ]

    def separate(model: Any) -> Tensor:
        out = []
        for prompt, answer in pairs:
            ids = torch.tensor([prompt + answer])
            out.append(plain(model, {"input_ids": ids, "labels": ids})[0, len(prompt) - 1 :].sum())
        return torch.stack(out)

    same(tiny(CONFIGS["llama"]()), lambda m: torch.stack([t.sum() for t in fast.packed_logps(m, pairs)]), separate)
    with pytest.raises(ValueError, match="call install"):
        fast.packed_logps(tiny(CONFIGS["llama"]()), pairs)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    raw = Tokenizer(tokenizer_models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def logged(trainer: Any, installed: bool) -> list[dict[str, float]]:
    if installed:
        assert fast.install(trainer.model) == []
    trainer.train()
    clocks = ("runtime", "per_second", "total_flos")
    return [{k: v for k, v in entry.items() if not any(c in k for c in clocks)} for entry in trainer.state.log_history]


ARGUMENTS: dict[str, Any] = {
    "max_steps": 3, "per_device_train_batch_size": 3, "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none", "use_cpu": True,
    "bf16": False, "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False, "eval_strategy": "steps", "eval_steps": 3,
}  # fmt: skip


def test_a_dpo_run_logs_the_same(tmp_path: Path) -> None:
    """Losses, rewards, log-probabilities and the rest of three steps and an evaluation of trl.DPOTrainer."""
    data = Dataset.from_list(
        [{"prompt": "w5 w6 w7", "chosen": f" w8 w9 w{i}", "rejected": f" w3{i % 7} w40 w41 w42"} for i in range(10, 16)]
    )
    histories = []
    for installed in (False, True):
        model = tiny(CONFIGS["llama"]())
        del model.base_model.model.forward  # DPOTrainer sets its own head
        config = DPOConfig(output_dir=str(tmp_path), loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], **ARGUMENTS)
        histories.append(
            logged(
                DPOTrainer(model, args=config, train_dataset=data, eval_dataset=data, processing_class=tokenizer()),
                installed,
            )
        )
    assert len(histories[0]) == 5
    for one, other in zip(*histories, strict=True):
        assert other == pytest.approx(one, rel=2e-4, abs=1e-5)


def test_an_sft_run_logs_the_same(tmp_path: Path) -> None:
    data = Dataset.from_list([{"input_ids": ids, "labels": [-100] * start + ids[start:]} for ids, start in ROWS])
    histories = []
    for installed in (False, True):
        model = tiny(CONFIGS["llama"]())
        del model.base_model.model.forward
        config = SFTConfig(
            output_dir=str(tmp_path), max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **ARGUMENTS
        )
        histories.append(
            logged(
                SFTTrainer(model, args=config, train_dataset=data, eval_dataset=data, processing_class=tokenizer()),
                installed,
            )
        )
    assert len(histories[0]) == 5
    for one, other in zip(*histories, strict=True):
        assert other == pytest.approx(one, rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bf16_is_as_close_to_float32_as_the_plain_path(seed: int) -> None:
    """Frozen weights in bf16, adapters in float32, under autocast."""
    given = batch()
    model = tiny(CONFIGS["llama"](), r=16)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.bfloat16().float() if "lora_" not in name else torch.randn_like(parameter) * 0.1
    wanted = gradients(model, (loss := -plain(model, given).sum()))
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    off: dict[str, list[float]] = {}
    for name, score in (("plain", plain), ("fast", fused)):
        if name == "fast":
            assert fast.install(model) == []
        with torch.autocast("cpu", torch.bfloat16):
            low = -score(model, given).sum()
        found = gradients(model, low)
        every = [torch.cat([g[name].flatten() for name in wanted]) for g in (found, wanted)]
        off[name] = [distance(low, loss), distance(*every)]
    assert off["fast"][1] <= 1.5 * off["plain"][1]
    assert off["fast"][0] <= 1.5 * off["plain"][0] or off["fast"][0] < 2**-9  # a sum: errors cancel by chance


def test_what_is_not_covered_is_named_and_keeps_its_own_path() -> None:
    given = batch()
    model = tiny(Gemma2Config(**SIZES, head_dim=16, query_pre_attn_scalar=16))
    with torch.no_grad():
        expected = fused(model, given)
        notes = fast.install(model)
        assert any(
            "gemma2" in n and "attn_logit_softcapping=50.0" in n and "final_logit_softcapping=30.0" in n for n in notes
        )
        torch.testing.assert_close(fused(model, given), expected)
    notes = fast.install(tiny(CONFIGS["llama"](), lora_dropout=0.1))
    assert [n.split(":")[0] for n in notes] == [
        "14 LoRA layers keep peft's forward (lora_dropout)",
        "equal beginnings of rows are not shared",
    ]
    notes = fast.install(tiny(CONFIGS["llama"](), use_dora=True))
    assert [n.split(":")[0] for n in notes] == ["14 LoRA layers keep peft's forward (variant DoraLinearVariant)"]
    with pytest.raises(NotImplementedError, match="softcap"):
        fast.attend(
            nn.Module(), x := torch.zeros(1, 1, 3, 4), x, x, None, layout=fast.lay_out([[1, 2, 3]]), softcap=30.0
        )


def test_dora_and_dropout_still_score_the_same() -> None:
    given = batch()
    for lora in ({"use_dora": True}, {"lora_dropout": 0.1}):
        model = tiny(CONFIGS["llama"](), **lora).eval()
        expected = plain(model, given)
        fast.install(model)
        assert distance(fused(model, given), expected) < 1e-5


def test_noise_in_the_embeddings_is_scaled_by_a_rows_length() -> None:
    """NEFTune (Jain et al. 2023, arXiv:2310.05914): α / √(length · width), of the padded batch."""
    model = tiny(CONFIGS["llama"]())
    lengths: list[int] = []
    embedding = model.get_base_model().get_input_embeddings()
    embedding.register_forward_hook(lambda _, __, out: lengths.append(out.shape[1]))
    fast.install(model)
    given = batch()
    fused(model, given)
    embedding.neftune_noise_alpha = 5.0
    fused(model, given)
    assert lengths[0] != given["input_ids"].shape[1] == lengths[1]


def test_without_the_adapter() -> None:
    """As a DPO reference is computed."""
    model, given = tiny(CONFIGS["llama"]()), batch()
    with torch.no_grad(), model.disable_adapter():
        expected = plain(model, given)
        fast.install(model)
        assert distance(fused(model, given), expected) < 1e-5
    assert distance(fused(model, given), expected) > 1e-2


@pytest.mark.parametrize("pack", [False, True])
def test_uninstall_lets_go_at_once(pack: bool) -> None:
    """Without the garbage collector: a copy of each weight may hang on it."""
    model = tiny(CONFIGS["llama"]())
    fast.install(model, pack=pack)
    fused(model, batch()).sum().backward()
    held = [weakref.ref(vars(m)["forward"]) for m in model.modules() if "forward" in vars(m) and hasattr(m, "lora_A")]
    assert len(held) > 10
    gc.disable()
    try:
        fast.uninstall(model)
        assert [ref for ref in held if ref() is not None] == []
    finally:
        gc.enable()


def test_generation_is_the_same_and_uninstall_leaves_nothing() -> None:
    model, given = tiny(CONFIGS["llama"]()).eval(), batch()
    prompt = given["input_ids"][:, :3]
    mask = torch.tensor([[1, 1, 1]] * 5 + [[0, 1, 1]])
    expected = model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=8, do_sample=False)
    forwards = [m.__dict__.get("forward") for m in model.modules()]
    fast.install(model)
    fast.install(model)
    assert torch.equal(
        model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=8, do_sample=False), expected
    )
    fast.uninstall(model)
    assert [m.__dict__.get("forward") for m in model.modules()] == forwards
    assert model.get_base_model().config._attn_implementation == "eager"
