"""Rendering with the model's chat template, one code path for training, evaluation and talking.

A conversation is cut into segments, prompt and assistant turns in turn, and each segment is tokenised by itself. The
prompt of a training row is therefore, token for token, what inference sends. See docs/decisions/0005-segments.md.
"""

import contextlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import params
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


def text(
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
    full = text(tokenizer, messages, system, prompt=prompt)
    eos = str(tokenizer.eos_token)
    cuts: dict[int, tuple[int, int]] = {}
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = text(tokenizer, messages[:index], system, prompt=True)
        through = text(tokenizer, messages[: index + 1], system)
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
