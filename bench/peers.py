"""What other programs reach at reforge's SFT: the same rows, adapter and batches, each in an environment of its own.

The environments are made once, from the pinned versions below, with the torch of this one. A peer that can't be set up or
does not run is a row that says so. Rows are given as text through the model's chat template, so that a peer's own template
may add or save a few tokens; its own count is what is divided by the time.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from bench.training import BASE, BATCH, TCMALLOC, WARM, rows

LLAMA_FACTORY = "llamafactory==0.9.5"
LITGPT = "litgpt==0.5.13"
FACTORY = """\
import json, sys, time
from transformers import TrainerCallback
from llamafactory.train.tuner import run_exp

class Clock(TrainerCallback):
    ends = []
    def on_step_end(self, args, state, control, **_):
        self.ends.append((time.perf_counter(), state.num_input_tokens_seen))

clock, given = Clock(), json.loads(sys.argv[1])
run_exp(given["arguments"], [clock])
(began, before), (ended, after) = clock.ends[given["warm"] - 1], clock.ends[-1]
print(json.dumps({"rate": float(after - before) / (ended - began)}))
"""


def environment(home: Path, name: str, packages: Sequence[str], without: Sequence[str] = ()) -> Path:
    """Its Python; made if it is not there.

    Raises:
        subprocess.CalledProcessError: it can't be made.
    """
    python = home / name / "bin/python"
    done = home / name / ".made"
    if not done.is_file():
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home / name)], check=True)  # noqa: S603
        for asked in ([f"torch=={version('torch').partition('+')[0]}"], packages):
            subprocess.run([*pip, *asked], check=True, capture_output=True, text=True)  # noqa: S603
        if without:
            remove = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *without]
            subprocess.run(remove, check=True, capture_output=True, text=True)  # noqa: S603
        done.touch()
    return python


def _texts() -> list[dict[str, str]]:
    """The rows of `bench.training` as `instruction` and `output`."""
    from tasks import chat

    tokenizer = chat.load_tokenizer(BASE)
    found = []
    for row in rows():
        asked = tokenizer.decode(row["prompt_ids"]).rsplit("<|im_start|>user\n", 1)[1].split("<|im_end|>")[0]
        found.append({"instruction": asked, "input": "", "output": tokenizer.decode(row["chosen_ids"][:-1])})
    return found


def llama_factory(home: Path, steps: int, checkpointing: bool) -> float:
    """Tokens per second that are no padding."""
    python = environment(home, "llama-factory", [LLAMA_FACTORY], ["torchvision", "torchaudio"])
    stub = next((home / "llama-factory/lib").glob("python*/site-packages")) / "torchaudio"
    stub.mkdir(exist_ok=True)  # it is imported, and does nothing for text
    (stub / "__init__.py").touch()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.json").write_text(json.dumps(_texts()))
        (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
        arguments = {
            "model_name_or_path": str(BASE), "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 8,
            "lora_alpha": 16, "lora_target": "all", "dataset": "rows", "dataset_dir": name, "template": "smollm2",
            "cutoff_len": 512, "per_device_train_batch_size": BATCH, "max_steps": steps + WARM, "learning_rate": 2e-4,
            "bf16": True, "use_cpu": True, "report_to": "none", "output_dir": f"{name}/out", "logging_steps": 1,
            "save_strategy": "no", "disable_gradient_checkpointing": not checkpointing,
            "include_num_input_tokens_seen": "non_padding", "dataloader_pin_memory": False,
        }  # fmt: skip
        given = json.dumps({"arguments": arguments, "warm": WARM})
        said = _run([str(python), "-c", FACTORY, given], folder, tcmalloc=not checkpointing)
    return float(json.loads(said.splitlines()[-1])["rate"])


def litgpt(home: Path, steps: int) -> float:
    """Tokens per second that are no padding: the rows' mean over its own time of a step."""
    python = environment(home, "litgpt", [LITGPT, "requests"])
    model = home / "litgpt-model"
    program = str(python.with_name("litgpt"))
    if not (model / "lit_model.pth").is_file():
        shutil.copytree(BASE, model, dirs_exist_ok=True)
        convert = [program, "convert_to_litgpt", str(model), "--model_name", "SmolLM2-135M-Instruct"]
        subprocess.run(convert, check=True, capture_output=True, text=True)  # noqa: S603
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = _texts()
        (folder / "rows.json").write_text(json.dumps(made))
        linear = [
            word for part in ("query", "key", "value", "projection", "mlp") for word in (f"--lora_{part}", "true")
        ]
        command = [
            program, "finetune_lora", str(model), "--data", "JSON", "--data.json_path", f"{name}/rows.json",
            "--data.val_split_fraction", "0.05", "--data.mask_prompt", "true", "--precision", "bf16-true",
            "--train.micro_batch_size", str(BATCH), "--train.global_batch_size", str(BATCH), "--train.log_interval", "1",
            "--train.max_steps", str(steps + WARM), "--train.epochs", "1", "--eval.initial_validation", "false",
            "--eval.final_validation", "false", "--lora_r", "8", "--lora_alpha", "16", *linear, "--out_dir", f"{name}/out",
        ]  # fmt: skip
        said = _run(command, folder, tcmalloc=True)
    times = [float(found) for found in re.findall(r"iter time: ([0-9.]+) ms", said)][WARM:]
    tokens = statistics.mean(len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in rows())
    return BATCH * tokens / (statistics.mean(times) / 1000)


def _run(command: list[str], folder: Path, *, tcmalloc: bool) -> str:
    preload = {"LD_PRELOAD": str(TCMALLOC)} if tcmalloc and TCMALLOC.is_file() else {}
    offline = {"HF_HUB_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1", "PYTHONPATH": ""}
    done = subprocess.run(  # noqa: S603
        command, cwd=folder, env=os.environ | preload | offline, capture_output=True, text=True, check=True
    )
    return done.stdout


def measure(home: Path, rounds: int, steps: int) -> dict[str, float | str]:
    """Peer → median of tokens per second, or why there is none."""
    home.mkdir(parents=True, exist_ok=True)
    peers: dict[str, Callable[[], float]] = {
        f"{LLAMA_FACTORY}, its defaults": lambda: llama_factory(home, steps, True),
        f"{LLAMA_FACTORY}, no checkpointing, tcmalloc": lambda: llama_factory(home, steps, False),
        f"{LITGPT}, bf16, tcmalloc": lambda: litgpt(home, steps),
    }
    found: dict[str, float | str] = {}
    for name, run in peers.items():
        try:
            found[name] = statistics.median(run() for _ in range(rounds))
        except (subprocess.CalledProcessError, OSError, ValueError, IndexError) as error:
            said = getattr(error, "stderr", None) or str(error)
            found[name] = f"does not run here: {' '.join(said.split())[-300:]}"
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    return found
