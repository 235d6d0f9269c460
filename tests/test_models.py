"""Loading, quantising, adapters and scoring: exact where it can be."""

import copy
import gc
import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
)

from tasks import fast, models
from tasks.params import UserError
from tests.conftest import LORA, NF4


def test_quantization_on_and_off(tiny: Path) -> None:
    import bitsandbytes as bnb

    quantized = models.load(tiny, NF4)
    layers = [m for m in quantized.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 14
    assert {m.weight.quant_state.quant_type for m in layers} == {"nf4"}
    assert all(m.weight.quant_state.nested for m in layers)
    assert (
        not models.load(tiny, NF4 | {"bnb_4bit_use_double_quant": False})
        .model.layers[0]
        .mlp.up_proj.weight.quant_state.nested
    )
    plain = models.load(tiny, None)
    assert not [m for m in plain.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert {p.dtype for p in plain.parameters()} == {models.compute_dtype()}
    assert plain.get_memory_footprint() > quantized.get_memory_footprint()


def _gradient(model: torch.nn.Module) -> torch.Tensor:
    model.zero_grad()
    ids = torch.arange(3, 35)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten().float() for n, p in model.named_parameters() if "lora_A" in n])


def _trained(tiny: Path) -> torch.nn.Module:
    model = models.new_adapter(models.load(tiny, NF4), LORA, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    return model.train()


def _evaluated(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(3, 35)[None])
    model.train()


def test_an_evaluation_pass_leaves_gradients_alone(tiny: Path) -> None:
    model = _trained(tiny)
    before = _gradient(model)
    _evaluated(model)
    assert torch.equal(_gradient(model), before)


@pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_bf16"), reason="the fault shows on CPUs with AVX512-BF16 only"
)
def test_packing_still_breaks_gradients(tiny: Path) -> None:
    """When this fails, bitsandbytes is mended: remove `models.keep_training_kernels`."""
    model = _trained(tiny)
    before = _gradient(model)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    with _quiet():
        _evaluated(model)
        after = _gradient(model)
    assert torch.nn.functional.cosine_similarity(before, after, dim=0) < 0.99


def test_a_loaded_model_repacks_no_weights(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On any machine: bitsandbytes is told that this CPU has AVX512-BF16."""
    from bitsandbytes.nn import Linear4bit, modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    assert Linear4bit(8, 8).support_avx512bf16_for_cpu
    layers = [layer for layer in models.load(tiny, NF4).modules() if isinstance(layer, Linear4bit)]
    assert [layer.support_avx512bf16_for_cpu for layer in layers] == [False] * 14


class _quiet:
    def __enter__(self) -> None:
        import warnings

        self.context = warnings.catch_warnings()
        self.context.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *exc: object) -> None:
        self.context.__exit__(*exc)


def test_adapter_is_float32_and_drawn_from_the_seed(tiny: Path) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(7)  # what happened before must not matter
        return {
            n: p for n, p in models.new_adapter(models.load(tiny, NF4), LORA, seed).named_parameters() if "lora_" in n
        }

    one, same, other = weights(1), weights(1), weights(2)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in one.values())
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)
    assert all(not p.any() for n, p in one.items() if "lora_B" in n)


@pytest.mark.parametrize(("targets", "count"), [("all-linear", 14), (["q_proj", "v_proj"], 4)])
def test_targets_and_rank(tiny: Path, targets: object, count: int) -> None:
    model = models.new_adapter(models.load(tiny, None), {"r": 8, "lora_alpha": 16, "target_modules": targets}, 0)
    found = [p for n, p in model.named_parameters() if "lora_A" in n]
    assert len(found) == count
    assert {p.shape[0] for p in found} == {8}


def test_unknown_target_is_one_line(tiny: Path) -> None:
    with pytest.raises(UserError, match="lora"):
        models.new_adapter(models.load(tiny, None), {"target_modules": ["nothing"]}, 0)


@pytest.fixture
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(("kind", "copied"), [("cpu", True), ("cuda", False)])
def test_only_what_is_mapped_is_copied(tiny: Path, monkeypatch: pytest.MonkeyPatch, kind: str, copied: bool) -> None:
    """On a GPU the embeddings would be there twice while they are copied: 1 GiB of an 8B model."""
    made: list[int] = []
    real = models.AutoModelForCausalLM.from_pretrained

    def loaded(*given: Any, **named: Any) -> Any:
        model = real(*given, **named | {"device_map": {"": "cpu"}})
        made.append(model.get_input_embeddings().weight.data_ptr())
        monkeypatch.setattr(models, "device", lambda: torch.device(kind))
        return model

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", loaded)
    model = models.load(tiny, NF4)
    assert (model.get_input_embeddings().weight.data_ptr() != made[0]) is copied


def _quantised(model: torch.nn.Module) -> list[weakref.ref[torch.nn.Module]]:
    return [
        weakref.ref(module) for module in model.modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt")
    ]


def test_bitsandbytes_still_ties_weights_to_their_layers(tiny: Path, no_gc: None) -> None:
    """When this fails, bitsandbytes is mended: remove `models.free_with_last_reference`."""
    config = BitsAndBytesConfig(**NF4)
    model = AutoModelForCausalLM.from_pretrained(tiny, quantization_config=config, device_map={"": models.device()})
    layers = _quantised(model)
    del model
    assert len([layer for layer in layers if layer() is not None]) == 14


@pytest.mark.parametrize("quantization", [NF4, {"load_in_8bit": True}])
def test_quantised_layers_go_with_their_model(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_gc: None, quantization: dict[str, Any]
) -> None:
    models.save_adapter(models.new_adapter(models.load(tiny, None), LORA, 0), tmp_path / "adapter")
    seen: list[weakref.ref[torch.nn.Module]] = []
    real = models.load

    def load(*given: Any, **named: Any) -> Any:
        model = real(*given, **named)
        seen.extend(_quantised(model))
        return model

    monkeypatch.setattr(models, "load", load)
    models.load(tiny, quantization)(input_ids=torch.arange(3, 35)[None])
    assert len(seen) == 14
    adapted = models.load_adapter(models.load(tiny, quantization), tmp_path / "adapter", trainable=False)
    models.answer_logprobs(adapted, [([1, 5, 9], [7, 2])], 1)
    del adapted
    models.load_merged(tiny, tmp_path / "adapter", quantization)
    assert len(seen) == 3 * 14
    assert not [layer for layer in seen if layer() is not None]


def test_a_4_bit_model_is_moved_and_saved_without_its_layers_ties(tiny: Path, tmp_path: Path) -> None:
    model = models.load(tiny, NF4)
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        assert torch.equal(copy.deepcopy(model).to("cpu")(input_ids=ids).logits, wanted)
        model.save_pretrained(tmp_path)
        assert torch.equal(models.load(tmp_path, None)(input_ids=ids).logits, wanted)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("quantization", [NF4, {"load_in_8bit": True}])
@pytest.mark.parametrize("dropped", [0, models.DROPPED])
def test_quantised_weights_leave_no_16_bit_copy_in_memory(
    tiny: Path, quantization: dict[str, Any], dropped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of 16-bit weights is no longer mapped, and what is loaded is what transformers loads."""
    monkeypatch.setattr(models, "DROPPED", dropped)
    from bitsandbytes import functional

    before = functional.quantize_4bit, functional.int8_vectorwise_quant
    ours = models.load(tiny, quantization)
    assert (functional.quantize_4bit, functional.int8_vectorwise_quant) == before
    assert str(tiny.resolve()) not in Path("/proc/self/maps").read_text()
    more = {"bnb_4bit_compute_dtype": models.compute_dtype()} if "load_in_4bit" in quantization else {}
    config = BitsAndBytesConfig(**quantization, **more)
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=models.compute_dtype(), quantization_config=config)
    expected = plain.state_dict()
    found = ours.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight


def test_a_loaded_model_is_frozen_and_scores_by_the_fast_path(tiny: Path) -> None:
    model = models.load(tiny, None)
    assert not any(p.requires_grad for p in model.parameters())
    assert fast.unpackable(model) == []


def test_answer_logprobs_are_those_of_one_row_alone(tiny: Path, tokenizer) -> None:
    model = models.load(tiny, None).float()
    rows = [([1, 5, 9], [7, 2]), ([1, 4], [8, 8, 8, 2]), ([1, 3, 3, 3, 3], [2])]
    together = models.answer_logprobs(model, rows, 3)
    for (prompt, answer), found in zip(rows, together, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
        wanted = [logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)]
        assert found == pytest.approx(wanted, abs=1e-5)


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        Gemma2Config(**SMALL, final_logit_softcapping=3.0, query_pre_attn_scalar=8),
        GraniteConfig(**SMALL, logits_scaling=4.0),
        CohereConfig(**SMALL, logit_scale=0.25),
    ],
    ids=lambda config: config.model_type,
)
def test_scores_are_those_of_the_models_own_logits(config: Any) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    rows = [([5, 9, 4], [7, 2]), ([8, 4], [3, 3, 2])]
    for (prompt, answer), found in zip(rows, models.answer_logprobs(model, rows, 2), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        assert found == pytest.approx([float(p[token]) for p, token in zip(logits, answer, strict=True)], abs=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SMALL, final_logit_softcapping=3.0, query_pre_attn_scalar=8),
        CohereConfig(**SMALL, logit_scale=0.25),
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_that_caps_its_logits_makes_those_of_answers_only(config: Any) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    rows = [([5, 9, 4], [7, 2]), ([8, 4], [3, 3, 2]), ([6] * 40, [5])]
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0].numel() // 32))
    with torch.no_grad():
        found = models.token_logits(model, rows)
        ids = models.pad([[*prompt, *answer] for prompt, answer in rows], 0)
        mask = models.pad([[1] * (len(prompt) + len(answer)) for prompt, answer in rows], 0)
        every = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert seen == [6, 3 * 41]
    for logits, whole, (prompt, answer) in zip(found, every, rows, strict=True):
        wanted = whole[len(prompt) - 1 : len(prompt) + len(answer) - 1]  # in one product with others: other last digits
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-6)


def test_merging_in_float32_is_exact_up_to_one_rounding(tiny: Path, tmp_path: Path) -> None:
    model = _trained(tiny)
    models.save_adapter(model, tmp_path)
    merged = models.load_merged(tiny, tmp_path, NF4)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    base = models.dequantized(layer.base_layer)
    wanted = base + layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, wanted.to(merged.dtype))
    plain = models.load_merged(tiny, tmp_path, NF4, onto_dequantized=False)
    assert not torch.equal(plain.model.layers[0].mlp.up_proj.weight, wanted.to(merged.dtype))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", [NF4, {"load_in_8bit": True}, None])
@pytest.mark.parametrize("onto", [True, False])
@pytest.mark.parametrize(
    "lora", [{}, {"use_dora": True, "target_modules": ["q_proj"]}, {"modules_to_save": ["model.norm"]}]
)
def test_merging_layer_by_layer_is_merging_all_at_once(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: torch.dtype,
    quantization: dict[str, Any] | None,
    onto: bool,
    lora: dict[str, Any],
) -> None:
    monkeypatch.setattr(models, "compute_dtype", lambda: torch.float32)
    base = tmp_path / "base"
    models.load(tiny, None).to(stored).save_pretrained(base)
    model = models.new_adapter(models.load(base, None), {"r": 4} | lora, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    models.save_adapter(model, tmp_path / "adapter")

    whole = models.load(base, None)
    if quantization and onto:
        with torch.no_grad():
            for name, module in models.load(base, quantization).named_modules():
                if "bnb" in type(module).__module__ or "bitsandbytes" in type(module).__module__:
                    whole.get_submodule(name).weight.copy_(models.dequantized(module))
    wanted = models.load_adapter(whole, tmp_path / "adapter", trainable=False).float().merge_and_unload().to(stored)
    found = models.load_merged(base, tmp_path / "adapter", quantization, onto_dequantized=onto)
    assert not [name for name, _ in found.named_modules() if "lora" in name or "modules_to_save" in name]
    assert found.state_dict().keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        assert found.state_dict()[name].dtype == stored
        assert torch.equal(found.state_dict()[name], tensor), name


@pytest.mark.parametrize("lora", [
    {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}, {"target_modules": r".*(q_proj|lm_head)"}, {},
], ids=["the head", "the embeddings", "an adapter on the head", "neither"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*tied:UserWarning", "ignore:Setting `save_embedding_layers`:UserWarning")
def test_embeddings_and_head_that_were_trained_apart_stay_apart(
    tiny: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    """In the base they are one, and with `tie_word_embeddings: true` whoever loads the merged model makes them one again."""
    model = models.new_adapter(models.load(tiny, None, dtype=torch.float32), LORA | lora, 0)
    assert model.get_base_model().config.tie_word_embeddings
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    models.save_adapter(model, tmp_path / "adapter")
    models.load_merged(tiny, tmp_path / "adapter", None).save_pretrained(tmp_path / "merged")
    again = models.load(tmp_path / "merged", None, dtype=torch.float32)
    assert again.config.tie_word_embeddings is (not lora)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("computing", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merged_model_has_the_dtype_of_its_base_on_any_machine(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computing: torch.dtype
) -> None:
    models.save_adapter(_trained(tiny), tmp_path)
    monkeypatch.setattr(models, "compute_dtype", lambda: computing)
    assert {p.dtype for p in models.load(tiny, None).parameters()} == {computing}
    for stored in (torch.bfloat16, torch.float32):
        base = tmp_path / str(stored)
        models.load(tiny, None).to(stored).save_pretrained(base)
        assert {p.dtype for p in models.load_merged(base, tmp_path, NF4).parameters()} == {stored}


def test_saved_adapter_names_no_path_of_this_machine(tiny: Path, tmp_path: Path) -> None:
    models.save_adapter(_trained(tiny), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert str(tiny.parent) not in (tmp_path / "adapter_config.json").read_text()


def test_device_and_precision_follow_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert models.device().type == "cuda"
    assert models.compute_dtype() == torch.float16
    assert models.attention(100) is None


@pytest.mark.parametrize(("cuda", "visible", "works", "said"), [
    ("13.0", None, True, True), ("13.0", "", True, False), ("13.0", "-1", True, False), ("13.0", None, False, False),
    (None, None, True, False),
])  # fmt: skip
def test_a_gpu_that_torch_does_not_find_is_said_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    cuda: str | None, visible: str | None, works: bool, said: bool,
) -> None:  # fmt: skip
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho 'NVIDIA L4, 535.54.03'; exit {int(not works)}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    models.no_gpu.cache_clear()
    for _ in range(2):
        models.load(tiny, None)
    models.no_gpu.cache_clear()
    assert capsys.readouterr().out.count("warning: computing on the CPU: NVIDIA L4, 535.54.03 is here") == said


def test_a_model_that_has_no_sdpa_is_loaded_with_what_it_has(tiny: Path, tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(vocab_size=100, num_key_value_heads=2, head_dim=8, **sizes)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    assert models.load(tmp_path, None).config._attn_implementation == "eager"
    assert models.load(tiny, None).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("quantization", [NF4, None])
def test_a_whole_module_is_trained_in_float32(tiny: Path, tmp_path: Path, quantization: dict[str, Any] | None) -> None:
    base = tmp_path / "base"
    models.load(tiny, None).to(torch.bfloat16).save_pretrained(base)
    model = models.new_adapter(
        models.load(base, quantization, dtype=torch.bfloat16), LORA | {"modules_to_save": ["model.norm"]}, 0
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    models.save_adapter(model, tmp_path / "adapter")
    again = models.load_adapter(models.load(base, quantization), tmp_path / "adapter", trainable=True)
    assert {p.dtype for p in again.parameters() if p.requires_grad} == {torch.float32}


def test_an_adapter_that_is_a_pickle_is_refused(tiny: Path, tmp_path: Path) -> None:
    """peft 0.21.2 reads adapter_model.bin where there is no safetensors file."""
    adapter = tmp_path / "adapter"
    models.save_adapter(models.new_adapter(models.load(tiny, None), LORA, 0), adapter)
    models.load_adapter(models.load(tiny, None), adapter, trainable=False)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"expected a \.safetensors file"):
        models.load_adapter(models.load(tiny, None), adapter, trainable=False)
