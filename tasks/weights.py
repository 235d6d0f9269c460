"""What model files say about themselves, held against what they hold before a library believes it.

Safetensors and GGUF only: neither can hold code, but both have a header that a broken download cuts and a hostile one makes
up. Formats: https://github.com/huggingface/safetensors#format and https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import json
import math
import mmap
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from tasks.params import UserError, short

LONGEST_HEADER = (
    20_000_000  # bytes; the safetensors library allows 100 MB, of which Python's objects would take gigabytes
)
# bits per value
DTYPES = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
          "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6,
          "F4": 4}  # fmt: skip
# GGUF's types of values that have one size: number → struct's letter
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# What a config may say of a model's width. A larger one than any tensor has is wrong, and could cost all memory.
WIDTHS = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "head_dim",
          "embedding_length", "feed_forward_length", "attention.head_count", "attention.key_length")  # fmt: skip
DEPTHS = ("num_hidden_layers", "block_count")


class Header(NamedTuple):
    shapes: dict[str, tuple[int, ...]]  # of every tensor
    facts: dict[str, Any]  # GGUF's numbers and texts


def nf4_bytes(count: int, double: bool = True) -> int:
    """Of a tensor of `count` weights as bitsandbytes keeps it: 4 bits each, a 32-bit scale for 64 and a 16-entry code.

    Double quantisation (Dettmers et al. 2023, arXiv:2305.14314, section 3) makes that an 8-bit scale, with a 32-bit one for
    256 scales, their own code of 256 and an offset.
    """
    blocks = math.ceil(count / 64)
    scales = blocks + 4 * math.ceil(blocks / 256) + 4 * 256 + 4 if double else 4 * blocks
    return math.ceil(count / 2) + scales + 4 * 16


def check_folder(folder: Path) -> None:
    """Refuse a folder whose model is not wholly in its safetensors files, or is not what its headers and config say.

    Raises:
        UserError: naming the file, and the tensor or key.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: an adapter, whose base would be read from elsewhere; merge it into its base first")
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        header = safetensors(folder / "model.safetensors")
    elif index.exists():
        header = sharded(index)
    else:
        raise UserError(
            f"{folder}: expected model.safetensors or {index.name}; pickled weights (.bin, .pt) are never loaded"
        )
    config = read_object(folder / "config.json")
    for level in (config, config.get("text_config")):
        if isinstance(level, dict):
            _plausible(folder / "config.json", level, header)
            for key in ("attn_implementation", "_attn_implementation"):
                named = level.get(key)  # one for all, or one for each part of the model
                for attention in named.values() if isinstance(named, dict) else [named]:
                    if isinstance(attention, str) and "/" in attention:
                        raise UserError(
                            f"{folder / 'config.json'}: attention {short(attention)} is code of the Hub, never run"
                        )


def inside(path: Path, root: Path) -> None:
    """Refuse a file, or a folder with one in it, that a link leads out of `root`: a change there would go unseen.

    Raises:
        UserError: naming the link.
    """
    for file in (path, *sorted(path.rglob("*"))):
        try:
            real = file.resolve(strict=True)
        except (OSError, RuntimeError):  # Python's word for a loop
            raise UserError(f"{file}: a link to nothing or to itself") from None
        if not real.is_relative_to(root.resolve()):
            raise UserError(f"{file} leads out of {root}, so that a change would go unseen")


def sharded(index: Path) -> Header:
    """The headers of all files that an index names, each as `safetensors` gives it. Raises: UserError"""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: expected a weight_map of tensors to files")
    shapes: dict[str, tuple[int, ...]] = {}
    shards: dict[str, Header] = {}
    for tensor, name in names.items():
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: expected the name of a .safetensors file beside it, found {short(name)}")
        if name not in shards:
            shards[name] = safetensors(index.parent / name)
        if tensor not in shards[name].shapes:
            raise UserError(f"{index}: tensor {short(tensor)} is not in {name}")
        shapes[tensor] = shards[name].shapes[tensor]
    return Header(shapes, {})


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises: UserError"""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(LONGEST_HEADER).decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected an object, found {type(found).__name__}")
    return found


def _plausible(path: Path, facts: dict[str, Any], header: Header) -> None:
    """Refuse a config that says more layers or a greater width than the tensors can have."""
    widest = max((side for shape in header.shapes.values() for side in shape), default=0)
    for keys, most, what in ((DEPTHS, len(header.shapes), "tensors"), (WIDTHS, widest, "wide is the widest tensor")):
        for key in keys:
            found = facts.get(key)
            if isinstance(found, int) and found > most:
                raise UserError(f"{path}: {key} {short(found)}, but {most} {what}")


def _apart(path: Path, spans: Iterable[tuple[int, int, str]], size: int, *, gapless: bool) -> None:
    """Refuse tensors (start, end, name) that overlap, leave their `size` bytes, or leave bytes that are no tensor's."""
    at, before = 0, "the header"
    for start, end, name in sorted(spans):
        if start < at or (gapless and start > at):
            raise UserError(
                f"{path}: tensor {short(name)} starts at byte {start}, expected {at}, behind {short(before)}"
            )
        if end > size:
            raise UserError(f"{path}: tensor {short(name)} ends at byte {end} of {size}: cut off, or not what it says")
        at, before = end, name
    if gapless and at != size:
        raise UserError(f"{path}: {size} bytes of tensors, expected {at} by its header")


def safetensors(path: Path) -> Header:
    """The header of a safetensors file that holds every tensor where and as large as it says, and nothing else.

    Raises:
        UserError: it does not.
    """
    try:
        size = path.stat().st_size - 8
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size, LONGEST_HEADER):
                raise UserError(
                    f"{path}: a header of {length} bytes in a file of {size + 8}: cut off, or no safetensors"
                )
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from None
    try:
        # lists of pairs in place of objects: a name that comes twice is seen
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its header is not valid JSON: {str(error)[:200]}") from None
    shapes: dict[str, tuple[int, ...]] = {}
    spans = []
    for name, given in entries if isinstance(entries, tuple) else ():
        if name == "__metadata__":
            continue
        if name in shapes:
            raise UserError(f"{path}: tensor {short(name)} comes twice")
        info = dict(given) if isinstance(given, tuple) else {}
        shape, offsets, bits = info.get("shape"), info.get("data_offsets"), DTYPES.get(str(info.get("dtype")))
        if bits is None or not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
            raise UserError(f"{path}: tensor {short(name)}: expected dtype, shape and two offsets, found {short(info)}")
        start, end = offsets
        wanted = math.prod(shape) * bits
        if 8 * (end - start) != wanted:
            raise UserError(
                f"{path}: tensor {short(name)}: {short(shape)} of {info['dtype']} take {short(wanted // 8)} bytes, found {end - start}"
            )
        shapes[name] = tuple(shape)
        spans.append((start, end, name))
    if not shapes:
        raise UserError(f"{path}: no tensor in it")
    _apart(path, spans, size - length, gapless=True)
    return Header(shapes, {})


def _naturals(values: object) -> TypeGuard[list[int]]:
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def gguf(path: Path) -> Header:
    """The header of a GGUF file that holds every tensor where and as large as it says.

    gguf 0.19.0 counts through an array as long as its header claims, 2⁶² entries if need be, beyond the file's end; needed
    while tests/test_weights.py::test_gguf_still_counts_beyond_the_end passes.

    Raises:
        UserError: it does not.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _gguf(path, data)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, struct.error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cut off, or no GGUF: {error}") from None


def _gguf(path: Path, data: mmap.mmap) -> Header:
    from gguf import GGML_QUANT_SIZES

    at = 0

    def take(letters: str) -> tuple[Any, ...]:
        nonlocal at
        values = struct.unpack_from(f"<{letters}", data, at)
        at += struct.calcsize(f"<{letters}")
        return values

    def text() -> str:
        nonlocal at
        (length,) = take("Q")
        if length > len(data) - at:
            raise UserError(
                f"{path}: a text of {length} bytes at byte {at} of {len(data)}: cut off, or not what it says"
            )
        at += length
        return data[at - length : at].decode("utf-8", "replace")

    def value(kind: int) -> Any:
        nonlocal at
        if kind == STRING:
            return text()
        if kind in SCALARS:
            return take(SCALARS[kind])[0]
        if kind != ARRAY:
            raise UserError(f"{path}: a value of the unknown type {kind} at byte {at}")
        of, count = take("IQ")
        least = 8 if of == STRING else struct.calcsize(SCALARS[of]) if of in SCALARS else 0
        if not least or count * least > len(data) - at:
            raise UserError(
                f"{path}: {count} values of type {of} at byte {at} of {len(data)}: cut off, or not what it says"
            )
        if of == STRING:
            for _ in range(count):
                text()
        else:
            at += count * least
        return None

    magic, version, tensors, keys = take("4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise UserError(f"{path}: expected GGUF version 2 or 3, found {magic!r} {version}")
    facts: dict[str, Any] = {}
    for _ in range(keys):
        key = text()
        if key in facts:
            raise UserError(f"{path}: key {short(key)} comes twice")
        facts[key] = value(take("I")[0])
    shapes: dict[str, tuple[int, ...]] = {}
    spans = []
    for _ in range(tensors):
        name, (dimensions,) = text(), take("I")
        if name in shapes or not 1 <= dimensions <= 4:
            raise UserError(f"{path}: tensor {short(name)} comes twice, or has {dimensions} dimensions of 1 … 4")
        shape = take("Q" * dimensions)
        kind, offset = take("IQ")
        if kind not in GGML_QUANT_SIZES:
            raise UserError(f"{path}: tensor {short(name)} is of the unknown type {kind}")
        block, size = GGML_QUANT_SIZES[kind]
        if shape[0] % block:
            raise UserError(f"{path}: tensor {short(name)}: rows of {shape[0]} are no multiple of {block}, its block")
        shapes[name] = shape
        spans.append((offset, offset + math.prod(shape) // block * size, name))
    alignment = facts.get("general.alignment", 32)
    if not shapes or type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise UserError(f"{path}: expected tensors, and an alignment that is a power of two, found {short(alignment)}")
    _apart(path, spans, len(data) - -(-at // alignment) * alignment, gapless=False)
    header = Header(shapes, facts)
    _plausible(path, {key.partition(".")[2]: found for key, found in facts.items()}, header)
    return header
