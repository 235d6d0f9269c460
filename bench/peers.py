"""What other programs reach at reforge's SFT and DPO: the same rows, adapter and batches, each in an environment of its own.

The environments are made once, from the pinned versions below, with the torch of this one. A peer that can't be set up or
does not run is a row that says so. torchtune and axolotl are given the tokens themselves, LLaMA-Factory and litgpt text:
LLaMA-Factory's template then adds one newline to a row, which it counts. Losses are of the completion only, adapters on all
linear layers but the head, in 32 bits beside a base of 16 where a peer can: torchtune's are of 16, axolotl's base is of 32,
since that is what they do on a CPU. All is of 32 on a CPU without products in bf16.
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
from typing import Any

from bench.training import BASE, BATCH, BF16, DTYPE, LORA, RANK, WARM, preload_tcmalloc, rows

LLAMA_FACTORY = "llamafactory==0.9.5"
LITGPT = "litgpt==0.5.13"
TORCHTUNE = "torchtune==0.6.1"
AXOLOTL = "axolotl==0.19.0"
# The start of a peer's process: notes when a step began and how many tokens it has that are no padding, whoever counts.
CLOCK = """\
import json, sys, time
given, begun = json.loads(sys.argv[1]), []

def clock(owner, step, tokens):
    once = getattr(owner, step)
    def timed(self, *arguments, **named):
        begun.append((time.perf_counter(), int(tokens(*arguments))))
        return once(self, *arguments, **named)
    setattr(owner, step, timed)

def tell():
    counted = begun[given["warm"]:]
    print(json.dumps({"seconds": counted[-1][0] - counted[0][0], "steps": len(counted) - 1,
                      "tokens": sum(tokens for _, tokens in counted[:-1])}))

"""
TRANSFORMERS = "from transformers import Trainer\nclock(Trainer, 'training_step', lambda _, batch, *__: batch['attention_mask'].sum())\n"
FACTORY = f"""{CLOCK}{TRANSFORMERS}
from llamafactory.train.tuner import run_exp
run_exp(given["arguments"])
tell()
"""
AXES = f"""{CLOCK}{TRANSFORMERS}
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train
do_train(load_cfg("config.json"), TrainerCliArgs())
tell()
"""
TUNE = f"""{CLOCK}
import runpy, torch, torchtune
from pathlib import Path
from omegaconf import OmegaConf

class Rows:  # a dataset; its tokenizer is only asked for the id of padding
    pad_id = 0
    def __init__(self, *_):
        self.rows = json.loads(Path("rows.json").read_text())
    def __len__(self):
        return len(self.rows)
    def __getitem__(self, index):
        return {{"tokens": self.rows[index]["input_ids"], "labels": self.rows[index]["labels"]}}

torchtune.Rows = Rows  # where its configuration finds it
recipe = Path(torchtune.__file__).parents[1] / "recipes/lora_finetune_single_device.py"
Recipe = runpy.run_path(str(recipe), run_name="recipe")["LoRAFinetuneRecipeSingleDevice"]
clock(Recipe, "_loss_step", lambda batch: (batch["tokens"] != Rows.pad_id).sum())
asked = OmegaConf.create(given["arguments"])
trained = Recipe(asked)
trained.setup(asked)
trained.train()
tell()
"""
Found = dict[str, float | str]


def environment(home: Path, name: str, packages: Sequence[str], without: Sequence[str] = ()) -> Path:
    """Its Python; made if it is not there, or there with other packages.

    Raises:
        subprocess.CalledProcessError: it can't be made.
    """
    python = home / name / "bin/python"
    done = home / name / ".made"
    torch = f"torch=={version('torch').partition('+')[0]}"  # named each time: a peer's own bounds let pip take another
    asked = " ".join((torch, *packages))
    if not done.is_file() or done.read_text() != asked:
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home / name)], check=True)  # noqa: S603
        for these in ([torch], [torch, *packages]):
            subprocess.run([*pip, *these], check=True, capture_output=True, text=True)  # noqa: S603
        if without:
            remove = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *without]
            subprocess.run(remove, check=True, capture_output=True, text=True)  # noqa: S603
        done.write_text(asked)
    return python


def _texts() -> list[dict[str, str]]:
    """The rows of `bench.training` as text: `instruction`, `output`, and `rejected` of a pair."""
    from tasks import render

    tokenizer = render.load_tokenizer(BASE)
    found = []
    for row in rows():
        asked = tokenizer.decode(row["prompt_ids"]).rsplit("<|im_start|>user\n", 1)[1].split("<|im_end|>")[0]
        output, rejected = (tokenizer.decode(row[f"{side}_ids"][:-1]) for side in ("chosen", "rejected"))
        found.append({"instruction": asked, "input": "", "output": output, "rejected": rejected})
    return found


def _tokens() -> list[dict[str, list[int]]]:
    """The rows of `bench.training` as SFT's tokens."""
    return [
        {
            "input_ids": row["prompt_ids"] + row["chosen_ids"],
            "attention_mask": [1] * (len(row["prompt_ids"]) + len(row["chosen_ids"])),
            "labels": [-100] * len(row["prompt_ids"]) + row["chosen_ids"],
        }
        for row in rows()
    ]


def _base(folder: Path) -> Path:
    """The base, whose config says 32 bits where these are measured: LLaMA-Factory computes in what it says."""
    if BF16:
        return BASE
    copy = folder / "model"
    shutil.copytree(BASE, copy)
    said = json.loads((copy / "config.json").read_text()) | {"dtype": "float32", "torch_dtype": "float32"}
    (copy / "config.json").write_text(json.dumps(said))
    return copy


def llama_factory(home: Path, steps: int, checkpointing: bool, stage: str = "sft") -> float:
    """Tokens per second that are no padding, or pairs per second of `dpo`."""
    python = environment(home, "llama-factory", [LLAMA_FACTORY], ["torchvision", "torchaudio"])
    stub = next((home / "llama-factory/lib").glob("python*/site-packages")) / "torchaudio"
    stub.mkdir(exist_ok=True)  # it is imported, and does nothing for text
    (stub / "__init__.py").touch()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        columns = {"prompt": "instruction", "query": "input"}
        pairs = {"ranking": True, "columns": columns | {"chosen": "output", "rejected": "rejected"}}
        info = {"file_name": "rows.json", **(pairs if stage == "dpo" else {})}
        (folder / "rows.json").write_text(json.dumps(_texts()))
        (folder / "dataset_info.json").write_text(json.dumps({"rows": info}))
        arguments = {
            "model_name_or_path": str(_base(folder)), "stage": stage, "do_train": True, "finetuning_type": "lora", "lora_rank": RANK,
            "lora_alpha": LORA["lora_alpha"], "lora_target": "all", "dataset": "rows", "dataset_dir": name,
            "template": "smollm2", "cutoff_len": 512, "per_device_train_batch_size": BATCH, "max_steps": steps + WARM + 1,
            "learning_rate": 2e-4, "bf16": BF16, "use_cpu": True, "report_to": "none", "output_dir": f"{name}/out",
            "logging_steps": 1, "save_strategy": "no", "disable_gradient_checkpointing": not checkpointing,
            "dataloader_pin_memory": False,
        }  # fmt: skip
        if stage == "dpo":  # against the base, by the adapter switched off
            arguments |= {"pref_loss": "sigmoid", "pref_beta": 0.1}
        found = _clocked(python, FACTORY, arguments, folder, tcmalloc=not checkpointing)
    return (found["tokens"] if stage == "sft" else BATCH * found["steps"]) / found["seconds"]


def axolotl(home: Path, steps: int) -> float:
    """Tokens per second that are no padding; in 32 bits, and without its kernels, which are written for GPUs."""
    python = environment(home, "axolotl", [AXOLOTL])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in _tokens()))
        settings = {
            "base_model": str(BASE), "adapter": "lora", "lora_r": RANK, "lora_alpha": LORA["lora_alpha"],
            "lora_target_linear": True, "datasets": [{"path": "rows.jsonl", "ds_type": "json", "type": ""}],
            "sequence_len": 512, "micro_batch_size": BATCH, "gradient_accumulation_steps": 1, "max_steps": steps + WARM + 1,
            "optimizer": "adamw_torch", "lr_scheduler": "cosine", "learning_rate": 2e-4, "bf16": False, "fp16": False,
            "tf32": False, "gradient_checkpointing": False, "sample_packing": False, "attn_implementation": "sdpa",
            "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False, "lora_embedding_kernel": False,
            "save_strategy": "no", "logging_steps": 1, "val_set_size": 0.0, "dataset_num_proc": 1, "output_dir": "out",
            "dataset_prepared_path": "prepared", "dataloader_pin_memory": False,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(settings))
        found = _clocked(python, AXES, {}, folder, tcmalloc=True)
    return found["tokens"] / found["seconds"]


def torchtune(home: Path, steps: int) -> float:
    """Tokens per second that are no padding: the base as its Llama 3.2, which also ties the embeddings."""
    python = environment(home, "torchtune", [TORCHTUNE, "torchao==0.10.0"])
    model = json.loads((BASE / "config.json").read_text())
    named = "torchtune.models.llama3_2.lora_llama3_2"
    arguments = {
        "model": {
            "_component_": named, "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
            "apply_lora_to_mlp": True, "lora_rank": RANK, "lora_alpha": LORA["lora_alpha"],
            "vocab_size": model["vocab_size"], "num_layers": model["num_hidden_layers"],
            "num_heads": model["num_attention_heads"], "num_kv_heads": model["num_key_value_heads"],
            "embed_dim": model["hidden_size"], "intermediate_dim": model["intermediate_size"], "max_seq_len": 512,
            "norm_eps": model["rms_norm_eps"], "rope_base": int(model["rope_parameters"]["rope_theta"]), "scale_factor": 1,
        },
        "tokenizer": {"_component_": "torchtune.Rows"}, "dataset": {"_component_": "torchtune.Rows"},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(BASE),
            "checkpoint_files": ["model.safetensors"], "recipe_checkpoint": None, "output_dir": "out", "model_type": "LLAMA3_2",
        },
        "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "lr": 2e-4},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 1,
        },
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": "logs"},
        "output_dir": "out", "device": "cpu", "dtype": DTYPE, "resume_from_checkpoint": False, "seed": 0, "shuffle": True,
        "save_adapter_weights_only": True, "batch_size": BATCH, "epochs": 1, "max_steps_per_epoch": steps + WARM + 1,
        "gradient_accumulation_steps": 1, "clip_grad_norm": 1.0, "compile": False, "log_every_n_steps": 1,
        "log_peak_memory_stats": False, "enable_activation_checkpointing": False, "enable_activation_offloading": False,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.json").write_text(json.dumps(_tokens()))
        found = _clocked(python, TUNE, arguments, folder, tcmalloc=True)
    return found["tokens"] / found["seconds"]


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
        (folder / "rows.json").write_text(json.dumps(_texts()))
        linear = [
            word for part in ("query", "key", "value", "projection", "mlp") for word in (f"--lora_{part}", "true")
        ]
        command = [
            program, "finetune_lora", str(model), "--data", "JSON", "--data.json_path", f"{name}/rows.json",
            "--data.val_split_fraction", "0.05", "--data.mask_prompt", "true", "--precision", "bf16-true" if BF16 else "32-true",
            "--train.micro_batch_size", str(BATCH), "--train.global_batch_size", str(BATCH), "--train.log_interval", "1",
            "--train.max_steps", str(steps + WARM), "--train.epochs", "1", "--eval.initial_validation", "false",
            "--eval.final_validation", "false", "--lora_r", str(RANK), "--lora_alpha", str(LORA["lora_alpha"]), *linear,
            "--out_dir", f"{name}/out",
        ]  # fmt: skip
        said = _run(command, folder, tcmalloc=True)
    times = [float(found) for found in re.findall(r"iter time: ([0-9.]+) ms", said)][WARM:]
    tokens = statistics.mean(len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in rows())
    return BATCH * tokens / (statistics.mean(times) / 1000)


def _clocked(
    python: Path, program: str, arguments: dict[str, Any], folder: Path, *, tcmalloc: bool
) -> dict[str, float]:
    """What `program` told last: `seconds`, `steps` and `tokens`."""
    given = json.dumps({"arguments": arguments, "warm": WARM})
    said = _run([str(python), "-c", program, given], folder, tcmalloc=tcmalloc)
    told: dict[str, float] = json.loads(said.splitlines()[-1])
    return told


def _run(command: list[str], folder: Path, *, tcmalloc: bool) -> str:
    preload = preload_tcmalloc() if tcmalloc else {}
    quiet = {
        "HF_HUB_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1", "PYTHONPATH": "", "DO_NOT_TRACK": "1", "AXOLOTL_DO_NOT_TRACK": "1",
    }  # fmt: skip
    done = subprocess.run(  # noqa: S603
        command, cwd=folder, env=os.environ | preload | quiet, capture_output=True, text=True, check=True, timeout=3600
    )
    return done.stdout


def measure(home: Path, rounds: int, steps: int) -> Found:
    """Peer → median of SFT's tokens per second, or why there is none."""
    return _medians(
        home,
        rounds,
        {
            f"{LLAMA_FACTORY}, its defaults": lambda: llama_factory(home, steps, True),
            f"{LLAMA_FACTORY}, no checkpointing, tcmalloc": lambda: llama_factory(home, steps, False),
            f"{LITGPT}, {DTYPE}, tcmalloc": lambda: litgpt(home, steps),
            f"{TORCHTUNE}, {DTYPE}, tcmalloc": lambda: torchtune(home, steps),
            f"{AXOLOTL}, fp32, tcmalloc": lambda: axolotl(home, steps),
        },
    )


def measure_dpo(home: Path, rounds: int, steps: int) -> Found:
    """Peer → median of DPO's pairs per second, or why there is none."""
    return _medians(
        home,
        rounds,
        {
            f"{LLAMA_FACTORY}, its defaults": lambda: llama_factory(home, steps, True, "dpo"),
            f"{LLAMA_FACTORY}, no checkpointing, tcmalloc": lambda: llama_factory(home, steps, False, "dpo"),
        },
    )


def _medians(home: Path, rounds: int, peers: dict[str, Callable[[], float]]) -> Found:
    preload_tcmalloc()
    home.mkdir(parents=True, exist_ok=True)
    found: Found = {}
    for name, run in peers.items():
        try:
            found[name] = statistics.median(run() for _ in range(rounds))
        except (subprocess.SubprocessError, OSError, ValueError, LookupError) as error:
            said = getattr(error, "stderr", None) or str(error)
            found[name] = f"does not run here: {' '.join(str(said).split())[-300:]}"
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    return found
