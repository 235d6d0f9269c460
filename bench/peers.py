"""What other programs reach at reforge's SFT and DPO: the same rows, adapter and batches, each in an environment of its own.

The environments are made once, from the pinned versions below, with the torch of this one. A peer that can't be set up or
does not run is a row that says so. torchtune and axolotl are given the tokens themselves, LLaMA-Factory and litgpt text:
LLaMA-Factory's template then adds one newline to a row, which it counts. Losses are of the completion only, adapters on all
linear layers but the head, in 32 bits beside a base of 16 where a peer can: torchtune's are of 16, axolotl's base is of 32,
since that is what they do on a CPU. All is of 32 on a CPU without products in bf16.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.training import (
    BASE,
    BATCH,
    BESIDE,
    BF16,
    DTYPE,
    GROUPED,
    KEPT_PRODUCTS,
    LORA,
    RANK,
    TURN,
    WARM,
    Process,
    beside,
    preload_tcmalloc,
    rows,
    start,
)

LLAMA_FACTORY = "llamafactory==0.9.5"
LITGPT = "litgpt==0.5.13"
TORCHTUNE = "torchtune==0.6.1"
AXOLOTL = "axolotl==0.19.0"
# The start of a peer's process: notes when a step began and how many tokens it has that are no padding, whoever counts, and takes
# turns as `training.Process` expects: what follows the first step of a turn is counted, up to where its last one begins.
CLOCK = """\
import json, sys, time
given, begun = json.loads(sys.argv[1]), []

def clock(owner, step, tokens):
    once = getattr(owner, step)
    def timed(self, *arguments, **named):
        done = len(begun) - given["warm"]
        if done >= 0 and done % given["turn"] == 0:
            last = begun[given["warm"]:][1 - given["turn"]:]
            told = {"seconds": last[-1][0] - last[0][0], "steps": len(last) - 1,
                    "tokens": sum(tokens for _, tokens in last[:-1])} if last else {}
            print(given["word"] + json.dumps(told), flush=True)
            sys.stdin.readline()
        begun.append((time.perf_counter(), int(tokens(*arguments))))
        return once(self, *arguments, **named)
    setattr(owner, step, timed)

"""
TRANSFORMERS = "from transformers import Trainer\nclock(Trainer, 'training_step', lambda _, batch, *__: batch['attention_mask'].sum())\n"
FACTORY = f"""{CLOCK}{TRANSFORMERS}
from llamafactory.train.tuner import run_exp
run_exp(given["arguments"])
"""
AXES = f"""{CLOCK}{TRANSFORMERS}
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train
do_train(load_cfg("config.json"), TrainerCliArgs())
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
"""
LIT = f"""{CLOCK}
from lightning import Fabric
from litgpt.__main__ import main
clock(Fabric, "backward", lambda *_: given["mean"])
sys.argv = ["litgpt", *given["arguments"]]
main()
"""
Found = dict[str, float | str]


@dataclass(frozen=True)
class Turns:
    """Beside whom a peer is measured, in how many turns of how many steps.

    As many as of the anchor, so that both are at rows of like length; the first is not counted, and the last only tells when the one
    before it ended.
    """

    anchor: Process
    rounds: int
    each: int

    @property
    def all(self) -> int:
        """Steps of a peer's training: with the one before which it tells of its last turn."""
        return WARM + self.rounds * self.each + 1


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


def llama_factory(home: Path, turns: Turns, checkpointing: bool, stage: str = "sft") -> list[float]:
    """In each turn, how many times faster than reforge: in tokens that are no padding, or in pairs of `dpo`."""
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
            "template": "smollm2", "cutoff_len": 512, "per_device_train_batch_size": BATCH, "max_steps": turns.all,
            "learning_rate": 2e-4, "bf16": BF16, "use_cpu": True, "report_to": "none", "output_dir": f"{name}/out",
            "logging_steps": 1, "save_strategy": "no", "disable_gradient_checkpointing": not checkpointing,
            "dataloader_pin_memory": False,
        }  # fmt: skip
        if stage == "dpo":  # against the base, by the adapter switched off
            arguments |= {"pref_loss": "sigmoid", "pref_beta": 0.1}
        elif not checkpointing:  # its best; of pairs its sampler knows no lengths
            arguments |= GROUPED
        return _beside(
            turns, stage, LLAMA_FACTORY, python, FACTORY, {"arguments": arguments}, folder, not checkpointing
        )


def axolotl(home: Path, turns: Turns) -> list[float]:
    """As `llama_factory`; in 32 bits, and without its kernels, which are written for GPUs."""
    python = environment(home, "axolotl", [AXOLOTL])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in _tokens()))
        settings = {
            "base_model": str(BASE), "adapter": "lora", "lora_r": RANK, "lora_alpha": LORA["lora_alpha"],
            "lora_target_linear": True, "datasets": [{"path": "rows.jsonl", "ds_type": "json", "type": ""}],
            "sequence_len": 512, "micro_batch_size": BATCH, "gradient_accumulation_steps": 1, "max_steps": turns.all,
            "optimizer": "adamw_torch", "lr_scheduler": "cosine", "learning_rate": 2e-4, "bf16": False, "fp16": False,
            "tf32": False, "gradient_checkpointing": False, "sample_packing": False, "attn_implementation": "sdpa",
            "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False, "lora_embedding_kernel": False,
            "save_strategy": "no", "logging_steps": 1, "val_set_size": 0.0, "dataset_num_proc": 1, "output_dir": "out",
            "dataset_prepared_path": "prepared", "dataloader_pin_memory": False,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(settings))
        return _beside(turns, "sft", AXOLOTL, python, AXES, {}, folder)


def torchtune(home: Path, turns: Turns) -> list[float]:
    """As `llama_factory`: the base as its Llama 3.2, which also ties the embeddings."""
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
        "save_adapter_weights_only": True, "batch_size": BATCH, "epochs": turns.all, "max_steps_per_epoch": None,
        "gradient_accumulation_steps": 1, "clip_grad_norm": 1.0, "compile": False, "log_every_n_steps": 1,
        "log_peak_memory_stats": False, "enable_activation_checkpointing": False, "enable_activation_offloading": False,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.json").write_text(json.dumps(_tokens()))
        return _beside(turns, "sft", TORCHTUNE, python, TUNE, {"arguments": arguments}, folder)


def litgpt(home: Path, turns: Turns) -> list[float]:
    """As `llama_factory`; each step is taken for one of as many tokens as the rows have in the mean."""
    python = environment(home, "litgpt", [LITGPT, "requests"])
    model = home / "litgpt-model"
    if not (model / "lit_model.pth").is_file():
        shutil.copytree(BASE, model, dirs_exist_ok=True)
        convert = [
            str(python.with_name("litgpt")),
            "convert_to_litgpt",
            str(model),
            "--model_name",
            "SmolLM2-135M-Instruct",
        ]
        subprocess.run(convert, check=True, capture_output=True, text=True)  # noqa: S603
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.json").write_text(json.dumps(_texts()))
        linear = [
            word for part in ("query", "key", "value", "projection", "mlp") for word in (f"--lora_{part}", "true")
        ]
        arguments = [
            "finetune_lora", str(model), "--data", "JSON", "--data.json_path", f"{name}/rows.json",
            "--data.val_split_fraction", "0.05", "--data.mask_prompt", "true", "--precision", "bf16-true" if BF16 else "32-true",
            "--train.micro_batch_size", str(BATCH), "--train.global_batch_size", str(BATCH), "--train.log_interval", "1",
            "--train.max_steps", str(turns.all), "--train.epochs", str(turns.all), "--eval.initial_validation", "false",
            "--eval.final_validation", "false", "--lora_r", str(RANK), "--lora_alpha", str(LORA["lora_alpha"]), *linear,
            "--out_dir", f"{name}/out",
        ]  # fmt: skip
        mean = BATCH * statistics.mean(len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in rows())
        return _beside(turns, "sft", LITGPT, python, LIT, {"arguments": arguments, "mean": mean}, folder)


def _beside(
    turns: Turns,
    what: str,
    name: str,
    python: Path,
    program: str,
    given: dict[str, Any],
    folder: Path,
    tcmalloc: bool = True,
) -> list[float]:
    """Of `program`, in each turn: how many times faster it was than reforge. With tcmalloc, it has few compiled products too."""
    added = preload_tcmalloc() if tcmalloc else KEPT_PRODUCTS
    quiet = {
        "HF_HUB_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1", "PYTHONPATH": "", "DO_NOT_TRACK": "1", "AXOLOTL_DO_NOT_TRACK": "1",
    }  # fmt: skip
    asked = json.dumps(given | {"warm": WARM, "turn": turns.each, "word": TURN})
    command = [str(python), "-c", program, asked]
    with Process(what, name, command, cwd=folder, env=os.environ | added | quiet) as process:
        return beside(turns.anchor, process, turns.rounds)


def measure(home: Path, rounds: int, steps: int) -> Found:
    """Peer → SFT's tokens per second, or why there is none."""
    return _measured(
        "sft",
        home,
        rounds,
        steps,
        {
            f"{LLAMA_FACTORY}, its defaults": partial(llama_factory, checkpointing=True),
            f"{LLAMA_FACTORY}, no checkpointing, by length, tcmalloc": partial(llama_factory, checkpointing=False),
            f"{LITGPT}, {DTYPE}, tcmalloc": litgpt,
            f"{TORCHTUNE}, {DTYPE}, tcmalloc": torchtune,
            f"{AXOLOTL}, fp32, tcmalloc": axolotl,
        },
    )


def measure_dpo(home: Path, rounds: int, steps: int) -> Found:
    """Peer → DPO's pairs per second, or why there is none."""
    return _measured(
        "dpo",
        home,
        rounds,
        steps,
        {
            f"{LLAMA_FACTORY}, its defaults": partial(llama_factory, checkpointing=True, stage="dpo"),
            f"{LLAMA_FACTORY}, no checkpointing, tcmalloc": partial(llama_factory, checkpointing=False, stage="dpo"),
        },
    )


def _measured(what: str, home: Path, rounds: int, steps: int, peers: dict[str, Callable[..., list[float]]]) -> Found:
    """Each in turn with `BESIDE`, which is in the table too: the median of its shares, times what that reached in all turns."""
    home.mkdir(parents=True, exist_ok=True)
    found: Found = {}
    reached: list[float] = []
    turn = 1 + steps
    for name, run in peers.items():
        with start(what, BESIDE, rounds * turn, turn) as anchor:
            try:
                found[name] = statistics.median(run(home, turns=Turns(anchor, rounds, turn)))
                reached += anchor.rates(what == "dpo")
            except (subprocess.SubprocessError, OSError, ValueError, LookupError, SystemExit) as error:
                said = getattr(error, "stderr", None) or str(error)
                found[name] = f"does not run here: {' '.join(str(said).split())[-300:]}"
        print(f"{name}: {found[name]} times {BESIDE}", file=sys.stderr, flush=True)
    if not reached:  # none runs here
        return found
    rate = statistics.median(reached)
    return {name: ratio * rate if isinstance(ratio, float) else ratio for name, ratio in found.items()} | {BESIDE: rate}
