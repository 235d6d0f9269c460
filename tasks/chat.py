"""Rendering with the model's chat template, one code path for training, evaluation and talking.

As a program, talk to a model of the pipeline:

    python -m tasks.chat data/merge/model
    python -m tasks.chat data/merge/model --compare data/base/model --ask "What is kyphosis?"

A conversation is cut into segments, prompt and assistant turns in turn, and each segment is tokenised by itself. The
prompt of a training row is therefore, token for token, what inference sends. See docs/decisions/0005-segments.md.
"""

import argparse
import contextlib
import gc
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import params, weights
from tasks.params import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
IGNORED = -100  # the label that torch's cross-entropy leaves out
DATE = "26 Jul 2024"  # that Llama 3's templates name if they are told none and have no clock; today's would be another tomorrow
_TAKES_SYSTEM: dict[str, bool] = {}  # by template


def load_tokenizer(base: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer with its chat template, from a local folder; remote code is never run.

    Raises:
        UserError: no chat template, or no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        str(base), local_files_only=True, trust_remote_code=False
    )
    if not tokenizer.chat_template:
        raise UserError(
            f"{base}: the tokenizer has no chat template; use an instruct model, or add chat_template.jinja"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"{base}: the tokenizer names no eos_token, so an answer could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: labels and attention masks are explicit everywhere
    return tokenizer


def control_strings(tokenizer: "PreTrainedTokenizerBase", *, answer: bool = False) -> list[str]:
    """Every string that the tokenizer reads as one control token, longest first.

    That is every special token, and of the other added tokens those that the chat template writes (`<tool_call>`, say):
    with them it marks what is whose. In the model's own `answer` the latter are its to write.

    A single ASCII character may be named to pad with. No text can do without it, so it is none.
    """
    found = set(tokenizer.all_special_tokens)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or (not answer and str(token).strip() and str(token) in str(tokenizer.chat_template)):
            found.add(str(token))
    return sorted((s for s in found if len(s) > 1 or not s.isascii()), key=lambda s: (-len(s), s))


def neutralise(text: str, controls: Sequence[str]) -> str:
    """NFC text in which no control string is left: a space after its first character breaks each one up."""
    text = unicodedata.normalize("NFC", text)
    for _ in range(8):
        if not any(control in text for control in controls):
            return text
        for control in controls:
            text = text.replace(control, f"{control[0]} {control[1:]}" if len(control) > 1 else " ")
    # a token such as "< " comes back with every space
    while any(control in text for control in controls):
        for control in controls:
            text = text.replace(control, "")
    return text


def _neutral(tokenizer: "PreTrainedTokenizerBase", text: str, controls: Sequence[str]) -> str:
    """`neutralise`, also of what the tokenizer's own normalisation makes of the text.

    A tokenizer may map ＜ to <, drop zero-width characters or change case, and look for an added token only then.

    Raises:
        UserError: it makes a control token of the text however that is written.
    """
    text = neutralise(text, controls)
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.normalized]
    if normalizer is None or not added:
        return text
    normal = [seen for token in added if token in controls and (seen := normalizer.normalize_str(token))]
    for _ in range(8):
        seen = normalizer.normalize_str(text)
        if not any(control in seen for control in normal):
            return text
        text = neutralise(seen, [*controls, *normal])
    raise UserError(f"the tokenizer makes a control token of {params.short(text)} however it is written")


def render(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], system: str | None, *, prompt: bool = False
) -> str:
    """The conversation as the template writes it; `prompt` adds the opening of the assistant's turn.

    User text can't hold a control token: see `control_strings`. `system` stands in where no system message is given; where the
    template has no place for one, it opens the first user turn.

    Raises:
        UserError: the template refuses the conversation, or is broken. transformers renders it in a sandbox.
    """
    turns = [dict(message) for message in messages]
    if system is not None and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    if len(turns) > 1 and turns[0]["role"] == "system" and not takes_system(tokenizer):
        first, second = turns[0]["content"], turns[1]["content"]
        turns[:2] = [{"role": turns[1]["role"], "content": f"{first}\n\n{second}"}]
    for turn in turns:
        controls = control_strings(tokenizer, answer=turn["role"] == "assistant")
        turn["content"] = _neutral(tokenizer, turn["content"], controls)
    try:
        return str(
            tokenizer.apply_chat_template(
                turns, chat_template=_dated(tokenizer), tokenize=False, add_generation_prompt=prompt, date_string=DATE
            )
        )
    except Exception as error:  # a template is a program: it may raise whatever Python does
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(
            f"the chat template can't render {roles}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from None


def _dated(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The chat template, if it asks for the day (SmolLM3's, Mistral Small's), with `DATE` for an answer."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or "strftime_now" not in template:
        return None
    return f"{{%- macro strftime_now(format) -%}}{DATE}{{%- endmacro -%}}{template}"


def takes_system(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a system message stands where it stood when an answer follows.

    Gemma's template refuses one; Mistral's (7B v0.3, Nemo, Small) writes it only while the user has the last word, so that a
    prompt would differ between training and inference. Said of templates that keep a conversation without one.
    """
    template = str(tokenizer.chat_template)
    if template not in _TAKES_SYSTEM:

        def stays(turns: list[Message]) -> bool:
            with contextlib.suppress(Exception):  # a template is a program: it may raise whatever Python does
                before, after = (
                    str(
                        tokenizer.apply_chat_template(
                            said, chat_template=_dated(tokenizer), tokenize=False, add_generation_prompt=said is turns
                        )
                    )
                    for said in (turns, [*turns, {"role": "assistant", "content": "c"}])
                )
                return after.startswith(before)
            return False

        asked: Message = {"role": "user", "content": "b"}
        _TAKES_SYSTEM[template] = stays([{"role": "system", "content": "a"}, asked]) or not stays([asked])
    return _TAKES_SYSTEM[template]


def segments(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], system: str | None, *, prompt: bool = False
) -> list[tuple[str, bool]]:
    """(text, is an assistant's answer) in order; the texts joined are the rendered conversation.

    An answer's text ends with the end-of-sequence token if the template writes it; what that puts behind it (a newline, say)
    opens the next segment. Where turns end otherwise than a text (Gemma's, with `<end_of_turn>`), it is added behind the
    last answer, and only there: no conversation that is served has it within. Of a template that rewrites earlier turns
    only the last answer is one; `conversations` has the others.

    Raises:
        UserError: the template does not even keep the last prompt.
    """
    full, cuts = _cuts(tokenizer, messages, system, prompt)
    eos = str(tokenizer.eos_token)
    out: list[tuple[str, bool]] = []
    at, last = 0, None if prompt else max(cuts, default=None)
    for index, (start, stop) in cuts.items():
        answer = full[start:stop]
        end = eos if index == last and not answer.endswith(eos) else ""
        out += [(full[at:start], False), (answer + end, True)]
        at = stop
    if at < len(full) and (prompt or not cuts):
        out.append((full[at:], False))
    return out


def _cuts(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], system: str | None, prompt: bool
) -> tuple[str, dict[int, tuple[int, int]]]:
    """The rendered conversation, and where in it each answer stands that it keeps, by its place among the messages."""
    full = render(tokenizer, messages, system, prompt=prompt)
    eos = str(tokenizer.eos_token)
    cuts: dict[int, tuple[int, int]] = {}
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:index], system, prompt=True)
        through = render(tokenizer, messages[: index + 1], system)
        if not full.startswith(through):
            through = through.removesuffix(eos)  # Phi's ends a text with it, not a turn
        if full.startswith(before) and through.startswith(before) and full.startswith(through):
            stop = through.find(eos, len(before))
            cuts[index] = len(before), stop + len(eos) if stop >= 0 else len(through)
        elif index == len(messages) - 1:
            raise UserError(
                "the chat template renders the same prompt differently with an answer behind it: no loss mask can be cut"
            )
    return full, cuts


def conversations(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], system: str | None
) -> list[Sequence[Message]]:
    """What to `encode` so that each answer is supervised once: `messages`, before them each answer that they do not keep.

    Qwen3's template drops the reasoning of earlier answers, an empty one too: what asked for them reads otherwise then.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(answers) < 2:
        return [messages]
    _, cuts = _cuts(tokenizer, messages, system, False)
    return [*(messages[: index + 1] for index in answers if index not in cuts), messages]


def encode(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], system: str | None, *, prompt: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation, equally long: a label is its token's id within an answer, else -100.

    What ends an answer is supervised. With `prompt`, ids end where the model is to go on.
    """
    ids: list[int] = []
    labels: list[int] = []
    for text, answer in segments(tokenizer, messages, system, prompt=prompt):
        piece: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        labels += piece if answer else [IGNORED] * len(piece)
    return ids, labels


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], system: str | None) -> list[int]:
    """Token ids that ask the model for the next answer."""
    return encode(tokenizer, messages, system, prompt=True)[0]


def encode_answer(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], answer: str, system: str | None
) -> list[int]:
    """Token ids of `answer` behind the prompt `messages`, its end-of-sequence token included."""
    prompt = encode_prompt(tokenizer, messages, system)
    ids, _ = encode(tokenizer, [*messages, {"role": "assistant", "content": answer}], system)
    if ids[: len(prompt)] != prompt:
        raise UserError(
            "the chat template renders the same prompt differently with an answer behind it: no loss mask can be cut"
        )
    return ids[len(prompt) :]


def ends(model: Any, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that end an answer: the one trained on, and those of the model, which may end a turn otherwise than a text."""
    own = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})


def _talk(model: Any, tokenizer: Any, messages: list[Message], system: str | None, tokens: int) -> str:
    import torch
    from transformers import TextStreamer

    prompt = torch.tensor([encode_prompt(tokenizer, messages, system)], device=model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            streamer=streamer,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends(model, tokenizer),
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
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if fast else torch.float16
    else:
        dtype = torch.bfloat16 if torch.cpu.get_capabilities().get("avx512_bf16") else torch.float32
    mps = "mps" if torch.backends.mps.is_available() else "cpu"
    # not `auto`, which leaves what a GPU has no room for on the CPU or the disk, and bitsandbytes refuses that
    place = {"": torch.device("cuda" if torch.cuda.is_available() else mps)}
    where = {
        "local_files_only": True, "trust_remote_code": False, "use_safetensors": True, "dtype": dtype, "device_map": place,
    }  # fmt: skip
    if not adapter:
        return AutoModelForCausalLM.from_pretrained(str(folder), **where).eval(), load_tokenizer(folder)
    given = BitsAndBytesConfig(**quantization) if quantization else None
    model = AutoPeftModelForCausalLM.from_pretrained(str(folder), quantization_config=given, **where).eval()
    return model, load_tokenizer(Path(model.peft_config["default"].base_model_name_or_path))


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
    histories: list[list[Message]] = [[] for _ in loaded]
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
