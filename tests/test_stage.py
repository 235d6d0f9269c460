"""How a stage starts and ends, and base and facts, as programs."""

import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tasks
from tasks import fast, stage
from tasks.params import UserError
from tests import small
from tests.conftest import ROOT, make_tiny, run


def _params(folder: Path, **replace: str) -> Path:
    text = (ROOT / "params.yaml").read_text()
    for old, new in replace.items():
        assert old in text, old
        text = text.replace(old, new)
    (folder / "params.yaml").write_text(text)
    return folder / "params.yaml"


def _base(folder: Path, model: str, **more: str) -> subprocess.CompletedProcess[str]:
    text = re.sub(
        r"base:\n(?:  .*\n)+",
        f"base:\n  model: {model}\n" + "".join(f"  {k}: {v}\n" for k, v in more.items()),
        (ROOT / "params.yaml").read_text(),
    )
    (folder / "params.yaml").write_text(text)
    command = [
        sys.executable,
        "-m",
        "tasks.base",
        "--source",
        "data/model",
        "--model",
        "data/base/model",
        "--facts",
        "data/base/facts.json",
    ]
    return run(command, folder, check=False, PYTHONPATH=str(ROOT))


def test_base_of_a_local_folder(tmp_path: Path) -> None:
    make_tiny(tmp_path / "data/model/tiny")
    done = _base(tmp_path, "data/model/tiny")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].startswith("base: data/model/tiny: 0 M parameters, GQA 4/2, bfloat16 (")
    facts = json.loads((tmp_path / "data/base/facts.json").read_text())
    # 2 layers of q 64×64, k and v 64×32, o 64×64, three of 64×128; embeddings are tied
    linear = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)
    total = linear + facts["vocabulary"] * 64 + 5 * 64
    assert facts["parameters"] == total
    assert facts["weight_bytes"]["float32"] == 4 * total
    assert facts["weight_bytes"]["float16"] == 2 * total
    assert facts["weight_bytes"]["int8"] == linear + 2 * (total - linear)
    tables = 14 * 4 * (256 + 16)  # of each tensor: the code of its scales, and its own
    assert facts["weight_bytes"]["nf4_double_quantised"] == pytest.approx(
        linear * 0.5 + linear / 64 + tables + 2 * (total - linear), rel=0.01
    )
    assert facts["kv_cache_bytes_per_token"] == 2 * 2 * 2 * 2 * 16
    assert facts["attention"]["kind"] == "GQA"
    assert facts["linear_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    event = json.loads((tmp_path / "data/base/event.json").read_text())
    assert event["seconds"] > 0
    assert event["peak_bytes"] > 10**8


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("data/model/missing", "is not there"),
        ("/etc/model", "expected a Hugging Face id"),
        ("data/raw/model", "expected a path below data/model/"),
        ("data/model/pickled", "pickled weights (.bin, .pt) are never loaded"),
        ("data/model/a.gguf", "is not there"),
        ("data/model/broken.gguf", "expected GGUF version 2 or 3"),
        ("package:nothing/x.gguf", "sha256: required"),
    ],
)
def test_base_refuses_in_one_line(tmp_path: Path, model: str, message: str) -> None:
    (tmp_path / "data/model/pickled").mkdir(parents=True)
    (tmp_path / "data/model/pickled/pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "data/model/broken.gguf").write_bytes(b"GGUF" + bytes(40))
    done = _base(tmp_path, model)
    assert done.returncode == 1
    assert message in done.stdout
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "data/base/model").exists()


def test_wrong_hash_and_unknown_target(tmp_path: Path) -> None:
    (tmp_path / "data/model").mkdir(parents=True)
    (tmp_path / "data/model/a.gguf").write_bytes(b"GGUF")
    assert "the file is another one" in _base(tmp_path, "data/model/a.gguf", sha256="'" + "0" * 64 + "'").stdout
    make_tiny(tmp_path / "data/model/tiny")
    text = (ROOT / "params.yaml").read_text().replace("target_modules: all-linear", "target_modules: [q_projj]")
    (tmp_path / "params.yaml").write_text(re.sub(r"model: package:.*\n  sha256: .*", "model: data/model/tiny", text))
    command = [
        sys.executable,
        "-m",
        "tasks.base",
        "--source",
        "data/model",
        "--model",
        "data/base/model",
        "--facts",
        "f.json",
    ]
    done = run(command, tmp_path, check=False, PYTHONPATH=str(ROOT))
    assert "did you mean `q_proj`" in done.stdout
    assert not (tmp_path / "data/base/model").exists()


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "data/model/evil")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n")
    done = _base(tmp_path, "data/model/evil")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "pwned").exists()


def test_a_stage_dies_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, time\nfrom pathlib import Path\nfrom tasks import stage\n"
        "def run(out: Path) -> str:\n    out.write_text(str(os.getpid()))\n    time.sleep(60)\n    return ''\n"
        "if __name__ == '__main__':\n    stage.main(run)\n"
    )
    _params(tmp_path)
    parent = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, 'slow.py', '--out', 'pid']); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    (left,) = _numbers(tmp_path / "pid", 1)
    assert small.alive(left)
    process.kill()
    process.wait()
    small.until(lambda: not small.alive(left), 20, "the stage outlived its parent")


def test_nothing_phones_home_unless_the_user_says_otherwise() -> None:
    """The libraries read these when they are imported, which the stages do first of all."""
    code = (
        "import os, runpy, tasks; runpy.run_module('tasks.sft', run_name='probe')\n"
        "from huggingface_hub import constants\n"
        "print(constants.HF_HUB_DISABLE_TELEMETRY, *(os.environ[name] for name in tasks.ENVIRONMENT))"
    )
    bare = ["env", *(f"--unset={name}" for name in tasks.ENVIRONMENT)]
    for given, said in (
        ([], "True 1 1 false warning :4096:8 128 128"),
        (["TRANSFORMERS_VERBOSITY=info"], "True 1 1 false info :4096:8 128 128"),
    ):
        assert run([*bare, *given, sys.executable, "-c", code], ROOT).stdout.splitlines()[-1] == said


@pytest.mark.skipif(not torch._C._has_mkldnn, reason="this torch has no oneDNN")
@pytest.mark.parametrize(
    ("given", "last"), [([], "cache_miss"), (["ONEDNN_PRIMITIVE_CACHE_CAPACITY=1024"], "cache_hit")]
)
def test_few_compiled_products_are_kept(given: list[str], last: str) -> None:
    """Of 200 numbers of rows oneDNN has forgotten the first one, unless the user has it keep more."""
    code = (
        "import tasks, torch\n"
        "weight = torch.ops.mkldnn._reorder_linear_weight(torch.ones(8, 8), 1)\n"
        "for rows in (*range(1, 200), 1):\n"
        "    torch.ops.mkldnn._linear_pointwise(torch.ones(rows, 8), weight, None, 'none', [], '')"
    )
    bare = ["env", "--unset=ONEDNN_PRIMITIVE_CACHE_CAPACITY", "ONEDNN_VERBOSE=profile_create", *given]
    said = run([*bare, sys.executable, "-c", code], ROOT).stdout.splitlines()
    products = [line.split(",")[3].partition(":")[2] for line in said if ",inner_product," in line]
    assert len(products) == 200
    assert products[:199] == ["cache_miss"] * 199
    assert products[-1] == last


@pytest.mark.skipif(not fast.packs(torch.bfloat16), reason="a CPU whose oneDNN has no products in bf16")
@pytest.mark.parametrize(("given", "grows"), [([], False), (["LRU_CACHE_CAPACITY=1024"], True)])
def test_what_torch_holds_of_compiled_products_is_bounded(given: list[str], grows: bool) -> None:
    """After 200 numbers of rows 400 more leave no more behind, unless the user has torch hold more."""
    code = (
        "import ctypes, tasks, torch\n"
        "class Info(ctypes.Structure): _fields_ = [(f'_{i}', ctypes.c_size_t) for i in range(10)]\n"
        "asked = ctypes.CDLL('libc.so.6').mallinfo2\n"
        "asked.restype = Info\n"
        "weight = torch.ones(64, 64, dtype=torch.bfloat16)\n"
        "for rows in range(600):\n"
        "    torch.ones(rows + 33, 64, dtype=torch.bfloat16) @ weight\n"
        "    before = asked()._7 if rows == 200 else before if rows > 200 else 0\n"
        "print(asked()._7 - before >> 20)"  # uordblks, bytes in use
    )
    bare = ["env", "--unset=LRU_CACHE_CAPACITY", "--unset=ONEDNN_PRIMITIVE_CACHE_CAPACITY", *given]
    grown = int(run([*bare, sys.executable, "-c", code], ROOT).stdout.splitlines()[-1])
    assert grown > 50 if grows else grown < 10


def _slow(folder: Path, *, imports: float = 0.0) -> None:
    """A stage of a DVC repository that says its number and then sleeps, after `imports` seconds before its `main`."""
    (folder / "slow.py").write_text(
        f"import os, sys, time\nfrom pathlib import Path\nimport tasks\nopen('importing', 'a').write(f'{{os.getpid()}} ')\n"
        f"time.sleep({imports})\nfrom tasks import stage\n"
        "def run(out: Path) -> str:\n    open('began', 'a').write(f'{os.getpid()} ')\n"
        "    time.sleep(float(Path('seconds').read_text()))\n    out.write_text('done')\n    return ''\n"
        "if __name__ == '__main__':\n    stage.main(run)\n"
    )
    (folder / "dvc.yaml").write_text("stages:\n  slow:\n    cmd: python slow.py --out o/out\n    outs: [o/out]\n")
    (folder / "seconds").write_text("60")
    run("git init -q -b main && dvc init -q && dvc config core.analytics false", folder)
    _params(folder)


def _numbers(path: Path, count: int) -> list[int]:
    small.until(lambda: path.exists() and len(path.read_text().split()) >= count, what=f"no {path.name}")
    return [int(number) for number in path.read_text().split()]


def test_what_a_killed_dvc_left_running_is_ended_by_the_next(tmp_path: Path) -> None:
    """A program between them that keeps dvc's environment to itself, as sudo does, hides dvc's death from the stage."""
    _slow(tmp_path)
    (tmp_path / "shell").write_text(
        '#!/bin/bash\nexport COMMAND="${@: -1}" STAGE=$DVC_STAGE\n'
        "exec env -u DVC_STAGE /bin/bash -c 'DVC_STAGE=$STAGE /bin/bash -c \"$COMMAND\"; exit $?'\n"
    )
    (tmp_path / "shell").chmod(0o755)
    first = small.start(["dvc", "repro"], tmp_path, SHELL=str(tmp_path / "shell"))
    (left,) = _numbers(tmp_path / "began", 1)
    first.kill()
    first.wait()
    first.stdout.close()
    time.sleep(0.5)
    assert small.alive(left)
    (tmp_path / "seconds").write_text("0")
    done = run("dvc repro", tmp_path, PYTHONPATH=str(ROOT))
    assert f"note: ending process {left}, which a killed dvc left running here" in done.stdout
    assert not small.alive(left)
    assert (tmp_path / "o/out").read_text() == "done"


# what runs a stage: bash turns into it, a shell that has more to do stays and waits for it, as does dash, which is /bin/sh
# on Debian, and what dvc takes where $SHELL is not set
SHELLS = {
    "bash": '#!/bin/bash\nexec /bin/bash "$@"\n',
    "none": None,
    "stays": '#!/bin/bash\n/bin/bash "$@"; exit $?\n',
    "two stay": '#!/bin/bash\n/bin/bash -c \'/bin/bash "$@"; exit $?\' shell "$@"; exit $?\n',
}


@pytest.mark.parametrize("imports", [30, 0], ids=["importing", "began"])
@pytest.mark.parametrize("shell", SHELLS)
def test_it_dies_with_dvc(tmp_path: Path, shell: str, imports: int) -> None:
    _slow(tmp_path, imports=imports)
    path = ""
    if text := SHELLS[shell]:
        (tmp_path / "shell").write_text(text)
        (tmp_path / "shell").chmod(0o755)
        path = str(tmp_path / "shell")
    first = small.start(["dvc", "repro"], tmp_path, SHELL=path)
    (left,) = _numbers(tmp_path / ("importing" if imports else "began"), 1)
    first.kill()
    first.wait()
    first.stdout.close()
    small.until(lambda: not small.alive(left), 20, "it was left behind")


def test_it_does_not_die_with_who_started_dvc(tmp_path: Path) -> None:
    """As `nohup dvc repro &` in a terminal that is closed."""
    _slow(tmp_path)
    terminal = small.start(["/bin/bash", "-c", "dvc repro & wait"], tmp_path, SHELL="")
    (left,) = _numbers(tmp_path / "began", 1)
    terminal.kill()
    terminal.wait()
    time.sleep(1)
    assert small.alive(left)
    os.killpg(terminal.pid, signal.SIGKILL)
    terminal.stdout.close()


def test_an_interrupt_is_no_traceback(tmp_path: Path) -> None:
    for imports, sign in ((30, "importing"), (0, "began")):
        folder = tmp_path / sign
        folder.mkdir()
        _slow(folder, imports=imports)
        process = small.start(["dvc", "repro"], folder)
        (pid,) = _numbers(folder / sign, 1)
        os.kill(pid, signal.SIGINT)
        said = small.finish(process)
        assert process.returncode != 0
        assert "Traceback" not in said, said


def test_inputs_must_be_what_their_stage_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stage.check_inputs("b", [Path("data/a/rows")])  # no dvc.lock yet
    (tmp_path / "data/a/rows").mkdir(parents=True)
    for name in ("x", "y"):
        (tmp_path / "data/a/rows" / name).write_text(name)
    run("git init -q && dvc init -q && dvc stage add -q -n a -o data/a/rows 'true' && dvc commit -q -f", tmp_path)
    own = tmp_path / "data/b"
    own.mkdir()
    for given in ("data/a/rows", "data/a/rows/x", "data/a", "data/b/out"):
        stage.check_inputs("b", [Path(given)])
    (tmp_path / "data/a/rows/x").write_text("z")
    stage.check_inputs("a", [Path("data/a/rows")])  # its own output, which it is about to write
    stage.check_inputs("b", [Path("data/a/rowsets"), Path("data/b/out")])
    for given in ("data/a/rows", "data/a/rows/y", "data/a"):
        with pytest.raises(
            UserError, match=r"^data/a/rows is not what `a` made: dvc.lock says \w+\.dir, found \w+\.dir; "
        ):
            stage.check_inputs("b", [Path(given)])


def test_an_entry_that_a_renamed_stage_left_in_the_lock_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC never drops it, so that the readers of the new stage failed for ever."""
    monkeypatch.chdir(tmp_path)
    run("git init -q && dvc init -q && dvc stage add -q -n old -o x 'echo 1 > x' && dvc repro -q", tmp_path)
    (tmp_path / "dvc.yaml").write_text("stages: {new: {cmd: echo 2 > x, outs: [x]}}\n")
    run("dvc repro -q", tmp_path)
    assert "  old:\n" in (tmp_path / "dvc.lock").read_text()
    stage.check_inputs("b", [Path("x")])
    (tmp_path / "x").write_text("3\n")
    with pytest.raises(
        UserError, match=r"^x is not what `new` made: .*; dvc.lock still has `old`, which dvc.yaml has not"
    ):
        stage.check_inputs("b", [Path("x")])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory; "),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), "out of memory; "),
        (OSError(28, "No space left on device", "x"), "the disk is full: [Errno 28] No space left on device: 'x'; "),
        (ValueError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full: Error while"),
        (OSError(30, "Read-only file system", "x"), "Read-only file system: x; free or unlock it"),
        (PermissionError(13, "Permission denied", "x"), "Permission denied: x; free or unlock it"),
        (FileNotFoundError(2, "No such file", "x"), None),
        (RuntimeError("a fault of ours"), None),
    ],
)  # fmt: skip
def test_what_is_the_machines_is_one_line(tmp_path: Path, error: Exception, said: str | None) -> None:
    found = stage._machine(error, [tmp_path / "out"])
    assert found == said or (found is not None and said is not None and found.startswith(said))


def test_the_event_says_what_can_change_a_byte(tmp_path: Path) -> None:
    make_tiny(tmp_path / "data/model/tiny")
    _base(tmp_path, "data/model/tiny")
    event = json.loads((tmp_path / "data/base/event.json").read_text())
    assert event["packages"]["torch"] == importlib.metadata.version("torch")
    assert {"transformers", "numpy", "tokenizers", "safetensors"} <= set(event["packages"])
    assert event["threads"] == int(os.environ["OMP_NUM_THREADS"])
    assert event["instruction_set"] == torch.backends.cpu.get_cpu_capability()
    assert event["cpu"]
    assert event["python"] == platform.python_version()


def test_sigterm_ends_it_within_a_destructor_too(tmp_path: Path) -> None:
    """Found by `make soak`: SystemExit raised in the end of a progress bar's generator was ignored, and the stage ran on."""
    (tmp_path / "probe.py").write_text(
        "import os, signal, time\n"
        "from pathlib import Path\n"
        "from tasks import stage\n"
        "class Bar:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(0.1)\n"
        "def run(out: Path) -> str:\n"
        "    bar = Bar()\n"
        "    del bar\n"
        "    out.write_text('it ran on')\n"
        "    return 'it ran on'\n"
        "if __name__ == '__main__':\n"
        "    stage.main(run)\n"
    )
    command = [sys.executable, "probe.py", "--out", "out", "--params", str(ROOT / "params.yaml")]
    done = run(command, tmp_path, check=False, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout) == (143, "")
    assert not (tmp_path / "out").exists()
