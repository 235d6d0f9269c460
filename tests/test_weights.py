"""Model files from outside: what is damaged or hostile is named in one line before it is loaded, and no code of it runs."""

import json
import math
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file, save_file

from tasks import base, render, weights
from tasks.params import Base, UserError
from tests.conftest import LORA

TENSORS = {"a": ("F32", [2, 2], [0, 16]), "b": ("BF16", [3], [16, 22])}


def pack(header: object, data: bytes = bytes(22), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensors(**changes: Any) -> dict[str, Any]:
    """The header of two tensors, 22 bytes, with some of it otherwise."""
    names = ("dtype", "shape", "data_offsets")
    return {name: dict(zip(names, info, strict=True)) | changes.get(name, {}) for name, info in TENSORS.items()}


# The bytes of a .safetensors file → what the one line says.
SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "a header of 0 bytes in a file of 0"),
    "the length alone": (struct.pack("<Q", 100), "a header of 100 bytes in a file of 8"),
    "a header beyond the file": (pack(tensors(), length=10_000), "a header of 10000 bytes"),
    "a header of 2⁶³ bytes": (pack(tensors(), length=2**63), "cut off, or no safetensors"),
    "a pickle by another name": (b"PK\x03\x04" + bytes(100), "cut off, or no safetensors"),
    "no JSON": (pack(b"{" * 50), "its header is not valid JSON"),
    "no UTF-8": (pack(b"\xff" * 50), "its header is not valid JSON"),
    "a nested bomb": (pack(b"[" * 1_000_000), "its header is not valid JSON"),
    "a list": (pack([1, 2]), "no tensor in it"),
    "metadata alone": (pack({"__metadata__": {"format": "pt"}}, b""), "no tensor in it"),
    "cut off": (pack(tensors(), bytes(20)), "tensor 'b' ends at byte 22 of 20: cut off"),
    "bytes behind the last tensor": (pack(tensors(), bytes(30)), "30 bytes of tensors, expected 22"),
    "a tensor that is larger than its bytes": (pack(tensors(a={"shape": [2, 3]})), "take 24 bytes, found 16"),
    "a tensor of 2¹²⁴ values": (pack(tensors(a={"shape": [2**62, 2**62]})), "bytes, found 16"),
    "100 dimensions": (pack(tensors(a={"shape": [2**62] * 100})), "expected dtype, shape and two offsets"),
    "a negative side": (pack(tensors(a={"shape": [-2, -2]})), "expected dtype, shape and two offsets"),
    "a shape of text": (pack(tensors(a={"shape": "2"})), "expected dtype, shape and two offsets"),
    "an unknown dtype": (pack(tensors(a={"dtype": "OBJECT"})), "expected dtype, shape and two offsets"),
    "one offset": (pack(tensors(a={"data_offsets": [0]})), "expected dtype, shape and two offsets"),
    "a tensor of a number": (pack(tensors() | {"c": 7}), "tensor 'c': expected dtype, shape and two offsets"),
    "tensors that overlap": (pack(tensors(b={"data_offsets": [8, 14]})), "tensor 'b' starts at byte 8, expected 16"),
    "a gap between tensors": (pack(tensors(b={"data_offsets": [20, 26]}), bytes(26)), "starts at byte 20, expected 16"),
    "the first behind a gap": (pack({"a": {"dtype": "U8", "shape": [1], "data_offsets": [7, 8]}}), "expected 0"),
    "a name twice": (pack(json.dumps(tensors()).replace('"b"', '"a"').encode()), "tensor 'a' comes twice"),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_safetensors_file_that_lies_is_named(tmp_path: Path, name: str) -> None:
    content, message = SAFETENSORS[name]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError) as error:
        weights.safetensors(tmp_path / "model.safetensors")
    assert message in str(error.value)
    assert "model.safetensors: " in str(error.value)


def test_a_sound_safetensors_file_passes(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(pack(tensors()))
    assert weights.safetensors(tmp_path / "x.safetensors").shapes == {"a": (2, 2), "b": (3,)}
    kinds = {"f": torch.ones(3, 1), "h": torch.ones(2, dtype=torch.float16), "i": torch.ones(0, 5, dtype=torch.int64)}
    kinds |= {
        "c": torch.ones(2, dtype=torch.complex64),
        "8": torch.ones(3).to(torch.float8_e4m3fn),
        "s": torch.tensor(1),
    }
    save_file(kinds, tmp_path / "kinds.safetensors", metadata={"format": "pt"})
    assert weights.safetensors(tmp_path / "kinds.safetensors").shapes == {k: tuple(v.shape) for k, v in kinds.items()}
    weights.check_folder(tiny)


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.integers(0, 10**6), value=st.integers(0, 255), end=st.integers(0, 10**6) | st.none())
def test_no_byte_breaks_the_check_of_safetensors(tmp_path: Path, at: int, value: int, end: int | None) -> None:
    """What passes the check is what the library reads; what does not is a `UserError`."""
    content = bytearray(pack(tensors()))
    content[at % len(content)] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(content[: None if end is None else end % (len(content) + 1)])
    try:
        shapes = weights.safetensors(path).shapes
    except UserError:
        return
    assert {name: tuple(tensor.shape) for name, tensor in load_file(path).items()} == shapes


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def gguf(*keys: bytes, infos: tuple[bytes, ...] = (), data: bytes = b"", **head: int) -> bytes:
    """A GGUF file of such keys and tensors; `keys` and `tensors` are the numbers of them that it claims."""
    start = b"GGUF" + struct.pack(
        "<IQQ", head.get("version", 3), head.get("tensors", len(infos)), head.get("keys", len(keys))
    )
    body = start + b"".join(keys) + b"".join(infos)
    return body + bytes(-len(body) % 32) + data


def info(name: bytes = b"a", shape: tuple[int, ...] = (2, 2), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ARRAY = text(b"k") + struct.pack("<IIQ", 9, 4, 2**62)
LAYERS = text(b"llama.block_count") + struct.pack("<II", 4, 10**9)
# The bytes of a .gguf file → what the one line says.
GGUF: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cut off, or no GGUF"),
    "four bytes": (b"GGUF", "cut off, or no GGUF"),
    "another format": (b"PK\x03\x04" + bytes(100), "expected GGUF version 2 or 3"),
    "version 1": (gguf(version=1), "expected GGUF version 2 or 3"),
    "the other byte order": (gguf(version=3 << 24), "expected GGUF version 2 or 3"),
    "no tensor": (gguf(), "expected tensors"),
    "2⁶² keys": (gguf(keys=2**62), "cut off"),
    "2⁶² tensors": (gguf(tensors=2**62), "cut off"),
    "a name of 2⁶² bytes": (gguf(struct.pack("<Q", 2**62)), "a text of 4611686018427387904 bytes"),
    "an array of 2⁶² numbers": (gguf(ARRAY), "4611686018427387904 values of type 4"),
    "an array of 2⁶² texts": (gguf(ARRAY.replace(struct.pack("<IQ", 4, 2**62), struct.pack("<IQ", 8, 2**62))), "of type 8"),
    "arrays 3000 deep": (gguf(text(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 3000), "1 values of type 9"),
    "a value of an unknown type": (gguf(text(b"k") + struct.pack("<I", 77)), "a value of the unknown type 77"),
    "a key twice": (gguf(*[text(b"k") + struct.pack("<IB", 0, 1)] * 2), "key 'k' comes twice"),
    "an alignment of 0": (gguf(text(b"general.alignment") + struct.pack("<II", 4, 0), infos=(info(),), data=bytes(16)), "power of two"),
    "cut off": (gguf(infos=(info(),), data=bytes(15)), "tensor 'a' ends at byte 16 of 15: cut off"),
    "a tensor beyond the file": (gguf(infos=(info(offset=2**40),), data=bytes(16)), "of 16: cut off"),
    "a tensor of 2¹²⁴ values": (gguf(infos=(info(shape=(2**62, 2**62)),), data=bytes(16)), "of 16: cut off"),
    "tensors that overlap": (gguf(infos=(info(), info(b"b", offset=8)), data=bytes(32)), "starts at byte 8, expected 16"),
    "a tensor twice": (gguf(infos=(info(), info()), data=bytes(32)), "tensor 'a' comes twice"),
    "9 dimensions": (gguf(infos=(info(shape=(1,) * 9),), data=bytes(16)), "9 dimensions"),
    "an unknown quantisation": (gguf(infos=(info(kind=99),), data=bytes(16)), "of the unknown type 99"),
    "half a block": (gguf(infos=(info(shape=(7,), kind=2),), data=bytes(99)), "no multiple of 32"),
    "10⁹ layers": (gguf(LAYERS, infos=(info(),), data=bytes(16)), "block_count 1000000000, but 1 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", GGUF)
def test_a_gguf_file_that_lies_is_named(tmp_path: Path, name: str) -> None:
    content, message = GGUF[name]
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError) as error:
        weights.gguf(tmp_path / "x.gguf")
    assert message in str(error.value)
    assert "x.gguf: " in str(error.value)


def test_a_sound_gguf_file_passes(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_block_count(1)
    writer.add_string("general.license", "mit")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc"])
    writer.add_array("numbers", [1.5, 2.5])
    writer.add_tensor("x", np.ones((3, 4), dtype=np.float32))
    writer.add_tensor("y", np.ones(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = weights.gguf(tmp_path / "x.gguf")
    assert header.shapes == {"x": (4, 3), "y": (5,)}
    assert header.facts["general.license"] == "mit"


def test_a_gguf_whose_rope_would_be_read_wrongly_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data/model"
    folder.mkdir(parents=True)
    writer = GGUFWriter(folder / "x.gguf", "llama")
    writer.add_tensor("rope_freqs.weight", np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="RoPE is scaled in a way that is not read from"):
        base.resolve(Base(model="data/model/x.gguf"), folder)


def test_gguf_still_counts_beyond_the_end(tmp_path: Path) -> None:
    """When this fails, gguf is mended: `weights.gguf` need not look at arrays."""
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + ARRAY)
    code = "import gguf, sys; gguf.GGUFReader(sys.argv[1])"
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", code, tmp_path / "x.gguf"], timeout=3, capture_output=True, check=False)


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4), st.integers(0, 10**6) | st.none())
def test_no_byte_breaks_the_check_of_gguf(tmp_path: Path, edits: list[tuple[int, int]], end: int | None) -> None:
    key = text(b"general.license") + struct.pack("<I", 8) + text(b"mit")
    array = text(b"tokens") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"bc")
    content = bytearray(gguf(key, array, infos=(info(), info(b"b", offset=32)), data=bytes(48)))
    for at, value in edits:
        content[at % len(content)] = value
    path = tmp_path / "x.gguf"
    path.write_bytes(content[: None if end is None else end % (len(content) + 1)])
    try:
        header = weights.gguf(path)
    except UserError:
        return
    assert all(math.prod(shape) < 10**6 for shape in header.shapes.values())


@pytest.fixture
def models(tmp_path: Path, tiny: Path) -> Path:
    """A folder data/model with the tiny model in it."""
    shutil.copytree(tiny, tmp_path / "model/mine")
    return tmp_path / "model"


def load(models: Path, tmp_path: Path, name: str = "mine", lora: dict[str, Any] = LORA, **given: Any) -> str:
    given_ = Base(**{"model": f"data/model/{name}", "dtype": "float32"} | given)
    return base.run(models, tmp_path / "out", tmp_path / "facts.json", given_, lora)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def stored(folder: Path, **changes: torch.Tensor | None) -> None:
    """The weights with some otherwise, or without them."""
    changed = load_file(folder / "model.safetensors") | changes
    save_file({name: value for name, value in changed.items() if value is not None}, folder / "model.safetensors")


def sharded(folder: Path, name: object) -> None:
    shapes = weights.safetensors(folder / "model.safetensors").shapes
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    given = {"metadata": {}, "weight_map": dict.fromkeys(shapes, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(given))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "other.safetensors")


def escaping(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent.parent / "away.safetensors")
    (folder / "model.safetensors").symlink_to("../../away.safetensors")


def looping(folder: Path) -> None:
    (folder / "x").symlink_to("y")
    (folder / "y").symlink_to("x")


def coded(folder: Path, file: str, **given: Any) -> None:
    """Code beside the model that leaves a mark if it is run."""
    mark = folder.parent.parent / "was-here"
    (folder / "mine.py").write_text(f"open({str(mark)!r}, 'w')\n")
    edit(folder / file, **given)


EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.0.mlp.up_proj.weight"
# What is done to a sound model → what the one line says.
FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing there": (shutil.rmtree, "mine is not there"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "pickled weights (.bin, .pt) are never loaded"),
    "a pickle beside another safetensors": (pickled, "pickled weights (.bin, .pt) are never loaded"),
    "weights cut off": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "cut off"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: can't be read: No such file"),
    "a truncated config": (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: expected an object, found list"),
    "a config of another type": (lambda f: edit(f / "config.json", hidden_size="x"), "can't be loaded"),
    "a config of no known type": (lambda f: edit(f / "config.json", model_type="mine"), "can't be loaded"),
    "10⁹ layers": (lambda f: edit(f / "config.json", num_hidden_layers=10**9), "num_hidden_layers 1000000000, but"),
    "a width of 10¹²": (lambda f: edit(f / "config.json", hidden_size=10**12), "hidden_size 1000000000000, but"),
    "heads of 10¹² values": (lambda f: edit(f / "config.json", head_dim=10**12), "head_dim 1000000000000, but"),
    "another width": (lambda f: edit(f / "config.json", intermediate_size=64), "can't be loaded"),
    "code of its own": (lambda f: coded(f, "config.json", model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}), "remote code is never run"),
    "code of its tokenizer": (lambda f: coded(f, "tokenizer_config.json", tokenizer_class="M", auto_map={"AutoTokenizer": ["mine.M", None]}), "remote code is never run"),
    "an attention of the Hub": (lambda f: edit(f / "config.json", _attn_implementation="evil/attention"), "is code of the Hub, never run"),
    "one behind another": (lambda f: edit(f / "config.json", attn_implementation="sdpa", _attn_implementation="evil/attention"), "is code of the Hub, never run"),
    "one for a part": (lambda f: edit(f / "config.json", _attn_implementation={"": "evil/attention"}), "is code of the Hub, never run"),
    "a weight that is missing": (lambda f: stored(f, **{UP: None}), "1 weights are missing: 'model.layers.0.mlp.up_proj.weight'"),
    "a weight of another shape": (lambda f: stored(f, **{UP: torch.ones(3, 3)}), "can't be loaded"),
    "a weight of NaN": (lambda f: stored(f, **{UP: torch.full((128, 64), torch.nan)}), "holds NaN or infinity"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "/other"}'), "merge it into its base first"),
    "a shard out of the folder": (lambda f: sharded(f, "../one.safetensors"), "expected the name of a .safetensors file beside it"),
    "a shard of root": (lambda f: sharded(f, "/etc/passwd"), "expected the name of a .safetensors file beside it"),
    "a shard that is a pickle": (lambda f: sharded(f, "one.bin"), "expected the name of a .safetensors file beside it"),
    "a shard of a number": (lambda f: sharded(f, 7), "expected the name of a .safetensors file beside it"),
    "a shard that is not there": (lambda f: sharded(f, "two.safetensors"), "two.safetensors: can't be read"),
    "a link out of data/model": (escaping, "leads out of"),
    "links in a circle": (looping, "a link to nothing or to itself"),
    "no chat template": (lambda f: (f / "chat_template.jinja").unlink(), "has no chat template"),
    "a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "can't be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_broken_or_hostile_is_named(models: Path, tmp_path: Path, name: str) -> None:
    change, message = FOLDERS[name]
    change(models / "mine")
    with pytest.raises(UserError) as error:
        load(models, tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "was-here").exists()
    assert not (tmp_path / "out").exists()


def test_a_sharded_model_is_the_same_model(models: Path, tmp_path: Path) -> None:
    (models / "mine/README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    said = load(models, tmp_path)
    before = (tmp_path / "out/model.safetensors").read_bytes()
    assert json.loads((tmp_path / "facts.json").read_text())["license"] == "mit"
    sharded(models / "mine", "one.safetensors")
    assert load(models, tmp_path) == said
    assert (tmp_path / "out/model.safetensors").read_bytes() == before


def test_variables_of_the_template_are_saved_in_it(models: Path, tmp_path: Path) -> None:
    """As Qwen3's `enable_thinking`: set once, and whoever renders with the saved model has it, whatever they pass."""
    path = models / "mine/chat_template.jinja"
    path.write_text(path.read_text() + "{{ '<quiet>' if enable_thinking is defined and not enable_thinking }}")
    turns = [{"role": "user", "content": "thumb"}]

    def rendered() -> str:
        return render.text(render.load_tokenizer(tmp_path / "out"), turns, None, prompt=True)

    load(models, tmp_path)
    assert (tmp_path / "out/chat_template.jinja").read_text() == path.read_text()
    plain = rendered()
    variables = {"enable_thinking": False, "name": "%} ' \" é", "nothing": None}
    load(models, tmp_path, chat_template_kwargs=variables)
    assert rendered() == plain + "<quiet>"
    template = render.load_tokenizer(tmp_path / "out").chat_template
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    said = environment.from_string(template + "{{ name }}, {{ nothing is none }}").render(
        messages=turns, enable_thinking=True
    )
    assert said.endswith("<quiet>%} ' \" é, True")


def test_a_pickle_is_not_even_read_beside_safetensors(models: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.pt", "consolidated.ckpt"):
        (models / f"mine/{name}").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    load(models, tmp_path)
    assert not list((tmp_path / "out").glob("*.bin"))


def test_a_rank_above_a_layer_is_named(models: Path, tmp_path: Path) -> None:
    # 2 heads of 16 values: the smallest layer is 64 × 32
    wide = {"r": 33, "lora_alpha": 8}
    with pytest.raises(
        UserError,
        match=r"lora\.r: expected at most 32, the smaller side of model\.layers\.0\.self_attn\.k_proj, found 33",
    ):
        load(models, tmp_path, lora=wide)
    load(models, tmp_path, lora=wide | {"target_modules": ["q_proj", "up_proj"]})
    load(models, tmp_path, lora=wide | {"target_modules": r".*\.q_proj"})
    load(models, tmp_path, lora=wide | {"rank_pattern": {"k_proj": 8, "v_proj": 8}})
    with pytest.raises(UserError, match=r"lora\.target_modules: no regular expression"):
        load(models, tmp_path, lora={"target_modules": "(q_proj"})


TEMPLATES = {
    "Python's classes": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "Python's modules": ("{{ cycler.__init__.__globals__.os.system('touch x') }}", "SecurityError"),
    "a list that is changed": ("{{ messages.append(1) }}", "SecurityError"),
    "an import": ("{% import 'os' as os %}", "TypeError"),
    "an unknown filter": ("{{ messages | nothing }}", "TemplateAssertionError"),
    "an open block": ("{% for m in messages %}", "TemplateSyntaxError"),
    "its own refusal": ("{{ raise_exception('only one turn') }}", "TemplateError: only one turn"),
    "division by zero": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "a loop without end": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "no end within",
    ),
    "a text without bounds": ("{{ 'a' * 20000000000 }}", "MemoryError"),
    "a power without bounds": ("{{ 9 ** (9 ** (9 ** 9)) }}", "no end within"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template_is_refused(
    tmp_path: Path, tokenizer: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, message = TEMPLATES[name]
    monkeypatch.setattr(tokenizer, "chat_template", template)
    monkeypatch.setattr(base, "TEMPLATE_SECONDS", 3)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        base.check_template(tokenizer, "mine")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    if "no end" not in message and "Memory" not in message:  # what base lets through for its own turns is caught later
        with pytest.raises(UserError, match="the chat template can't render user"):
            render.text(tokenizer, [{"role": "user", "content": "a"}], None)
