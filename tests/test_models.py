"""Loading, quantising, adapters, scoring and generating: exact where it can be."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks import chat, fast, models
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


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("quantization", [NF4, {"load_in_8bit": True}])
@pytest.mark.parametrize("dropped", [0, models.DROPPED])
def test_quantised_weights_leave_no_16_bit_copy_in_memory(
    tiny: Path, quantization: dict[str, Any], dropped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of 16-bit weights is no longer mapped, and what is loaded is what transformers loads."""
    monkeypatch.setattr(models, "DROPPED", dropped)
    from bitsandbytes import functional
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

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


def test_generation_in_batches_is_generation_alone(tiny: Path, tokenizer) -> None:
    model = models.load(tiny, None).float()
    prompts = [chat.encode_prompt(tokenizer, [{"role": "user", "content": "thumb " * n}], None) for n in (1, 4, 9)]
    together = models.generate(model, tokenizer, prompts, {}, 12, 3)
    alone = [models.generate(model, tokenizer, [p], {}, 12, 1)[0] for p in prompts]
    assert together == alone
    assert models.generate(model, tokenizer, prompts, {"repetition_penalty": 5.0}, 12, 3) != together


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
    assert models.attention(100) == "sdpa"


def test_an_adapter_that_is_a_pickle_is_refused(tiny: Path, tmp_path: Path) -> None:
    """peft 0.21.2 reads adapter_model.bin where there is no safetensors file."""
    adapter = tmp_path / "adapter"
    models.save_adapter(models.new_adapter(models.load(tiny, None), LORA, 0), adapter)
    models.load_adapter(models.load(tiny, None), adapter, trainable=False)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"expected a \.safetensors file"):
        models.load_adapter(models.load(tiny, None), adapter, trainable=False)
