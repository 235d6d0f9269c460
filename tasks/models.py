"""Models on the device at hand: loading, quantising, adapters, seeding and scoring."""

import contextlib
import ctypes
import functools
import json
import mmap
import os
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    set_seed,
)

from tasks import fast, weights
from tasks.params import UserError

Row = tuple[Sequence[int], Sequence[int]]  # prompt and answer, token ids
# what scales or caps logits behind the head: Gemma, Granite, Cohere, HyperCLOVA X, Falcon-H1, …
LOGIT_FIELDS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
SCORED = 1024  # tokens whose logits are held at once: 0.6 GiB of 152,000 in float32
DROPPED = 1 << 25  # bytes of 16-bit weights that may stay in memory while the next are quantised


def device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@functools.cache
def no_gpu() -> str:
    """What to say where a GPU is there and this torch does not find it, once a process; else nothing."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if torch.version.cuda is None or hidden or torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return ""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True)  # noqa: S603
    if done.returncode or not done.stdout.strip():
        return ""
    said = (
        f"warning: computing on the CPU: {done.stdout.splitlines()[0]} is here, but torch {torch.__version__} (CUDA "
        f"{torch.version.cuda}) does not find it; is the driver too old for it? CUDA_VISIBLE_DEVICES= says that the CPU is meant"
    )
    print(said, flush=True)
    return said


def compute_dtype() -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, else float16 on a GPU and float32 on a CPU."""
    kind = device().type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if kind == "cpu":
        return torch.bfloat16 if torch.cpu.get_capabilities().get("avx512_bf16") else torch.float32
    return torch.float16


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, and ask torch for deterministic kernels. Comes before an adapter is created."""
    random.seed(seed)
    np.random.seed(seed)
    set_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # the NaN fill of fresh memory that comes with it costs up to a tenth and changes no result
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010  (torch gives it no type)


def attention(longest: int) -> str | None:
    """Attention implementation for training on rows of up to `longest` tokens; None: the model's own choice.

    torch 2.13's SDPA on CPU spends most of its time in its backward pass (13 % of a step at 44 tokens, where `eager`
    takes 2 %); `eager` keeps an n × n matrix per head, too much for long rows. A GPU has good SDPA kernels.
    """
    return "eager" if device().type == "cpu" and longest <= 512 else None


def load(
    folder: Path, quantization: dict[str, Any] | None, attention: str | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A model from safetensors in a local folder, frozen and in eval mode, on the device at hand.

    Args:
        folder: output of `base` or `merge`.
        quantization: fields of `BitsAndBytesConfig`; None loads 16 bits (32 where the hardware has no 16).
        attention: by default transformers' choice, `sdpa` where the model allows it (Gemma 2 and gpt-oss do not).
        dtype: of weights that are not quantised; by default `compute_dtype()`.

    Raises:
        UserError: a file of weights is truncated, or missing.
    """
    no_gpu()
    dtype = dtype or compute_dtype()
    extra: dict[str, Any] = {}
    if quantization is not None:
        given = dict(quantization)
        if given.get("load_in_4bit"):
            given.setdefault("bnb_4bit_compute_dtype", dtype)
        extra["quantization_config"] = BitsAndBytesConfig(**given)
    check_weights(folder)
    with _read_once(folder) if quantization is not None else contextlib.nullcontext():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            device_map={"": device()},
            local_files_only=True,
            use_safetensors=True,
            attn_implementation=attention,
            trust_remote_code=False,
            **extra,
        )
    if quantization is not None:  # a tensor that stays in 16 bits on a CPU, the embeddings, keeps its whole file mapped
        if device().type == "cpu":
            for parameter in model.parameters():
                if parameter.dtype.is_floating_point:
                    parameter.data = parameter.data.clone()
        _give_back()
    free_with_last_reference(model)
    keep_training_kernels(model)
    return model.requires_grad_(False).eval()


@contextlib.contextmanager
def _read_once(folder: Path) -> Iterator[None]:
    """Drop what tensors in 16 bits took of this process's memory, in the file and in the heap, once they are quantised.

    safetensors maps the files: what has been read of them would count beside the quantised weights until the last of
    them is there. The pages are clean, and read again if need be. Linux only.
    """
    from bitsandbytes import functional

    inside, libc = f"{folder.resolve()}/", ctypes.CDLL(None)
    own = {name: getattr(functional, name) for name in ("quantize_4bit", "int8_vectorwise_quant")}
    read = 0

    def drop() -> None:
        for line in Path("/proc/self/maps").read_text().splitlines():
            if inside in line:
                first, last = (int(end, 16) for end in line.split(maxsplit=1)[0].split("-"))
                libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
        _give_back()

    def then_drop(quantize: Callable[..., Any]) -> Callable[..., Any]:
        def one(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
            nonlocal read
            found = quantize(tensor, *arguments, **named)
            read += tensor.nbytes
            if read >= DROPPED:
                read = 0
                drop()
            return found

        return one

    try:
        if sys.platform == "linux":
            vars(functional).update({name: then_drop(quantize) for name, quantize in own.items()})
        yield
    finally:
        vars(functional).update(own)


def _give_back() -> None:
    """Return the free pages of the heap, its holes too; glibc only. Weights in 16 bits leave large ones."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def check_weights(folder: Path) -> None:
    """Refuse weights that are not what their header says, before gigabytes of them are read.

    Raises:
        UserError: naming the file, what is wrong, and what to do.
    """
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            weights.sharded(index)
        else:
            files = sorted(folder.glob("*.safetensors"))
            if not files:  # peft and transformers would fall back to a pickle
                raise UserError(f"{folder}: expected a .safetensors file; pickled weights (.bin, .pt) are never loaded")
            for path in files:
                weights.safetensors(path)
    except UserError as error:
        raise UserError(f"{error}; remove it and run `dvc repro`, or `python -m flows.mend` if it comes back") from None


def free_with_last_reference(model: nn.Module) -> None:
    """Untie bitsandbytes 0.50.2's 4-bit weights from their layers, which it ties both ways: `del` would free neither.

    Symptom: quantised layers stay in memory, beside the next model, until Python looks for cycles among all its objects. A
    weight needs its layer while it is quantised or read, to leave it its `quant_state`; moving and saving do without.
    Needed while `tests/test_models.py::test_bitsandbytes_still_ties_weights_to_their_layers` passes.
    """
    for parameter in model.parameters():
        if getattr(parameter, "module", None) is not None:
            setattr(parameter, "module", None)  # noqa: B010  (unknown to torch's types)


def keep_training_kernels(model: nn.Module) -> int:
    """Stop bitsandbytes 0.50.2 from repacking 4-bit weights in place on CPUs with AVX512-BF16; returns how many layers.

    Symptom: after any forward in eval mode, gradients of the same layer are silently wrong and a merge gives garbage.
    Needed while `tests/test_models.py::test_packing_still_breaks_gradients` passes.
    """
    changed = 0
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (unknown to nn.Module's types)
            changed += 1
    return changed


def new_adapter(model: PreTrainedModel, lora: dict[str, Any], seed: int) -> PeftModel:
    """LoRA (Hu et al. 2021, arXiv:2106.09685) on `model`, B zero and A drawn from `seed`, in float32.

    `r`, `lora_alpha`, `target_modules` and the rest are peft's own. float32: a bf16 weight near 0.02 moves in steps of
    1e-4, in which the updates of a small learning rate vanish.
    """
    seed_everything(seed)
    given = {"target_modules": "all-linear"} | lora
    try:
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **given))
    except ValueError as error:
        raise UserError(f"lora: {' '.join(str(error).split())}") from None
    adapter_float32(adapted)
    return adapted


def load_adapter(model: PreTrainedModel, adapter: Path, *, trainable: bool) -> PeftModel:
    """`adapter` of `sft` or `dpo` on its base.

    Raises:
        UserError: its file is truncated.
    """
    check_weights(adapter)
    adapted = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable, local_files_only=True)
    adapted.peft_config["default"].base_model_name_or_path = model.name_or_path  # where it is now
    adapter_float32(adapted)
    return adapted


def load_merged(
    base: Path, adapter: Path, quantization: dict[str, Any] | None, *, onto_dequantized: bool = True
) -> PreTrainedModel:
    """The base with `adapter` merged into its weights, layer by layer in float32, then rounded to the dtype of its files.

    That dtype is `base.dtype` and no matter of the machine; `cast` to `compute_dtype()` is what computes fast.

    An adapter trained on a quantised base was trained around the quantisation error. `onto_dequantized` merges it into
    that base's values; else into the original weights. See docs/decisions/0006-merge.md for how they compare.
    """
    stored = stored_dtype(base)
    plain: Any = load(base, None, dtype=stored)
    embeddings, head = plain.get_input_embeddings(), plain.get_output_embeddings()
    adapted = load_adapter(plain, adapter, trainable=False)
    sources: dict[str, nn.Module] = {}
    if quantization is not None and onto_dequantized:
        sources = {
            name: module
            for name, module in load(base, quantization).named_modules()
            if hasattr(getattr(module, "weight", None), "quant_state") or type(module).__name__ == "Linear8bitLt"
        }
    model = adapted.get_base_model()
    for name, module in model.named_modules():  # one layer at a time in float32, never all of them
        layer = module.get_base_layer() if isinstance(module, LoraLayer) else module
        source = sources.pop(name, None)
        if source is not None:
            layer.weight.data = dequantized(source)
        if layer is not module:
            if layer in (embeddings, head) and embeddings.weight is head.weight:  # what one gains is not the other's
                layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
            for parameter in layer.parameters(recurse=False):
                parameter.data = parameter.data.float()
            module.merge(safe_merge=True)
        if source is not None or layer is not module:
            for parameter in layer.parameters(recurse=False):
                parameter.data = parameter.data.to(stored)
    # its layers are merged; what else peft holds, `modules_to_save`, is put in place, and if embeddings and head are no longer
    # one, the config says so: `tests/test_models.py::test_embeddings_and_head_that_were_trained_apart_stay_apart`
    with warnings.catch_warnings():
        known = ".*already merged|Already following adapters|Input and output embeddings are no longer tied"
        warnings.filterwarnings("ignore", known, UserWarning)
        merged: PreTrainedModel = adapted.merge_and_unload()
    return cast(merged, stored).eval()


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """`model` with its weights in `dtype`, in place.

    `Module.to` rounds buffers too, among them the frequencies of RoPE, which stay float32 in a model that is loaded: in
    bf16 they are wrong by up to 0.2 %, which is a radian after some hundred tokens.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of a saved model's weights, as its config.json has it."""
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    return config.dtype or torch.float32  # transformers' own default


def dequantized(module: nn.Module) -> Tensor:
    """The float32 weight `(out, in)` that a bitsandbytes layer computes with."""
    from peft.utils.integrations import dequantize_bnb_weight

    weight: Any = module.weight
    values: Tensor = dequantize_bnb_weight(weight, state=getattr(module, "state", None))
    return values.float()


def adapter_float32(model: nn.Module) -> None:
    """Adapter weights, and whole modules that are trained beside them, in float32.

    trl 1.16 casts what is trained of a quantised model to bf16 when a trainer is made.
    """
    for name, parameter in model.named_parameters():
        if "lora_" in name or (parameter.requires_grad and parameter.is_floating_point()):
            parameter.data = parameter.data.float()


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Adapter weights and config, without the path of the base model: an output holds no path of this machine."""
    model.save_pretrained(str(folder), safe_serialization=True, selected_adapters=["default"])
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "data/base/model"
    for key, value in config.items():
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            config[key] = sorted(value)  # peft keeps a set: its order changes from run to run
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first, so that memory runs out at the start or not at all."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def pad(rows: Sequence[Sequence[int]], value: int, *, at: int | None = None) -> Tensor:
    """Rows of token ids as one tensor `(rows, longest)`, filled up with `value` at their ends, or before position `at`."""
    width = max(len(row) for row in rows)
    cut = [len(row) if at is None else at for row in rows]
    padded = [[*r[:c], *[value] * (width - len(r)), *r[c:]] for r, c in zip(rows, cut, strict=True)]
    return torch.tensor(padded, device=device())


def token_logits(model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
    """For each (prompt, answer) of token ids, the float32 logits `(len(answer), vocabulary)` that predict the answer."""
    states, head = before_head(model, rows)
    return list(torch.split(head(states).float(), [len(answer) for _, answer in rows]))


def before_head(model: nn.Module, rows: Sequence[Row]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What predicts the answers' tokens, one after another, and what makes logits of it.

    The head runs over answer positions only, unless the model does more to its logits than that and takes no mask of them.
    """
    ids = pad([[*prompt, *answer] for prompt, answer in rows], 0)
    mask = pad([[1] * (len(prompt) + len(answer)) for prompt, answer in rows], 0)
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own = any(getattr(inner.config.get_text_config(), name, None) is not None for name in LOGIT_FIELDS)
    states: Tensor
    if own and hasattr(sys.modules[type(inner).__module__], "slice_logits_to_keep"):  # transformers 5.23: all but a few
        kept = torch.zeros_like(mask, dtype=torch.bool)
        for row, (prompt, answer) in zip(kept, rows, strict=True):
            row[len(prompt) - 1 : len(prompt) + len(answer) - 1] = True
        return inner(
            input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept
        ).logits, lambda logits: logits
    if own:
        states = inner(input_ids=ids, attention_mask=mask, use_cache=False).logits
    else:
        states = inner.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    picked = [states[i, len(prompt) - 1 : len(prompt) + len(answer) - 1] for i, (prompt, answer) in enumerate(rows)]
    return torch.cat(picked), (lambda logits: logits) if own else inner.get_output_embeddings()


def _token_logprobs(model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
    """log p of every answer token, `(len(answer),)` each, with the logits of `SCORED` tokens at a time."""
    states, head = before_head(model, rows)
    targets = torch.tensor([token for _, answer in rows for token in answer], device=states.device)
    parts = zip(torch.split(states, SCORED), torch.split(targets, SCORED), strict=True)
    found = [head(part).float().log_softmax(-1).gather(1, target[:, None])[:, 0] for part, target in parts]
    return list(torch.split(torch.cat(found), [len(answer) for _, answer in rows]))


@torch.no_grad()
def answer_logprobs(
    model: nn.Module, rows: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int, progress: str | None = None
) -> list[list[float]]:
    """log p of every answer token given all before it, in nats, for each (prompt, answer) of token ids.

    On a CPU, rows that begin alike (the options of one question) share the computation of what they begin with.
    """
    from tqdm import tqdm

    packed = device().type == "cpu" and not fast.unpackable(model)
    out: list[list[float]] = [[] for _ in rows]
    if packed:
        fast.install(model)
        order = sorted(range(len(rows)), key=lambda i: [*rows[i][0], *rows[i][1]])
        groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    else:
        groups = list(batches([len(p) + len(a) for p, a in rows], batch_size))
    for group in tqdm(groups, desc=progress, disable=progress is None, mininterval=2):
        part = [rows[i] for i in group]
        scores = fast.packed_logps(model, part) if packed else _token_logprobs(model, part)
        for index, score in zip(group, scores, strict=True):
            out[index] = score.tolist()
    if packed:
        fast.uninstall(model)
    return out


@torch.inference_mode()
def distributions(model: nn.Module, rows: Sequence[Row], batch_size: int) -> list[Tensor]:
    """For each row the log-probabilities `(len(answer), vocabulary)` that predict its answer, on the CPU in float32."""
    out: list[Tensor] = [torch.empty(0)] * len(rows)
    for group in batches([len(p) + len(a) for p, a in rows], batch_size):
        for index, logits in zip(group, token_logits(model, [rows[i] for i in group]), strict=True):
            out[index] = logits.log_softmax(-1).cpu()
    return out
