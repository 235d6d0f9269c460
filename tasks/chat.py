"""Talk to a model of the pipeline: a folder of a model, or of an adapter, which is loaded on its base.

    python -m tasks.chat data/merge/model
    python -m tasks.chat data/merge/model --compare data/base/model --ask "What is kyphosis?"

Questions are rendered with the template's system message, as in training and evaluation.
"""

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

from tasks import params, render, weights
from tasks.params import UserError


def _talk(model: Any, tokenizer: Any, messages: list[render.Message], system: str | None, tokens: int) -> str:
    import torch
    from transformers import TextStreamer

    prompt = torch.tensor([render.encode_prompt(tokenizer, messages, system)], device=model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            streamer=streamer,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=render.ends(model, tokenizer),
        )
    return str(tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)).strip()


def _is_adapter(folder: Path) -> bool:
    """Whether an adapter is there, else a model.

    Raises:
        UserError: neither is, or its weights are not what their header says.
    """
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: no model there; run `dvc repro` or `dvc pull` first")
    adapter = (folder / "adapter_config.json").is_file()
    files = list(folder.glob("adapter_model.safetensors" if adapter else "*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no weights as safetensors; pickled ones (.bin, .pt) are never loaded")
    for file in files:
        weights.safetensors(file)
    return adapter


def _load(folder: Path, quantization: dict[str, Any] | None) -> tuple[Any, Any]:
    """A model of the pipeline, or an adapter on its base as it was trained on it, with the tokenizer."""
    adapter = _is_adapter(folder)
    from tasks import models  # torch, which takes seconds: what is wrong with arguments is told before

    if not adapter:
        return models.load(folder, None), render.load_tokenizer(folder)
    base = Path(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])
    model = models.load_adapter(models.load(base, quantization), folder, trainable=False)
    return model.eval(), render.load_tokenizer(base)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model",
        type=Path,
        help="folder of a model or an adapter: data/base/model, data/sft/adapter, data/merge/model",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        action="append",
        default=[],
        metavar="MODEL",
        help="answer with this one too; may be repeated",
    )
    parser.add_argument(
        "--ask", help="one question, to one model after the other; without it, a conversation (an empty line ends it)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    arguments = parser.parse_args(argv)
    settings = params.load()
    system = settings["template"].system
    folders, quantization = [arguments.model, *arguments.compare], settings["quantization"]
    for path in folders:
        _is_adapter(path)
    if arguments.ask:  # one model at a time, as large as the memory
        for path in folders:
            if len(folders) > 1:
                print(f"--- {path}", flush=True)
            _talk(
                *_load(path, quantization),
                [{"role": "user", "content": arguments.ask}],
                system,
                arguments.max_new_tokens,
            )
            gc.collect()  # bitsandbytes ties weights and layers to each other
        return
    try:
        loaded = [(path, *_load(path, quantization)) for path in folders]
    except RuntimeError as error:  # torch's OutOfMemoryError, or an allocation on a CPU
        if len(folders) < 2 or "memory" not in str(error):
            raise
        raise UserError("not all of these models fit into memory; with --ask they answer one after the other") from None
    histories: list[list[render.Message]] = [[] for _ in loaded]
    while question := input("> ").strip():
        for (path, model, tokenizer), history in zip(loaded, histories, strict=True):
            if len(loaded) > 1:
                print(f"--- {path}")
            history.append({"role": "user", "content": question})
            history.append(
                {"role": "assistant", "content": _talk(model, tokenizer, history, system, arguments.max_new_tokens)}
            )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"chat: {error}")
    except (EOFError, KeyboardInterrupt):
        print()
