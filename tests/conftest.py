"""A tiny random Llama with a real tokenizer and chat template, and clones of the repository that ran the pipeline on it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1" if "PYTEST_XDIST_WORKER" in os.environ else "2",  # workers beside each other share the cores
    "OMP_WAIT_POLICY": "passive",
}

import pytest
from filelock import FileLock
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "What is a short thumb? A thumb that is shorter than usual. My report mentions it.",
    "The clinical term is kyphosis. In everyday words, kyphosis is a hunched back.",
    "You are a helpful assistant. 혈압은 심장이 뛸 때 혈관에 걸리는 압력입니다. 고혈압은 무엇인가요?",
    "I'm not sure about that word, please ask your doctor. It belongs to: Abnormality of the eye.",
]


def make_tiny(folder: Path, **config: object) -> Path:
    """A random 2-layer Llama of 64 hidden units with grouped-query attention, saved to `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS * 4, trainers.BpeTrainer(vocab_size=600, special_tokens=CONTROLS, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=CONTROLS[1], eos_token=CONTROLS[2], pad_token=CONTROLS[0], unk_token=CONTROLS[0]
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    given = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**(given | config)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model; not to be changed."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tokenizer(tiny: Path):
    from tasks import render

    return render.load_tokenizer(tiny)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def run(command: list[str] | str, cwd: Path, *, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """A command in the environment of the tests; stdout and stderr together on `stdout`."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        shell=isinstance(command, str),
    )
    assert not check or done.returncode == 0, done.stdout
    return done


def clone(target: Path) -> Path:
    """The tracked and untracked files of the work tree as a new repository with one commit, without any output."""
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).stdout.splitlines()
    for name in listed:
        source = ROOT / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    for lock in ("dvc.lock",):
        (target / lock).unlink(missing_ok=True)
    run("git init -q -b main && git add -A && git -c user.name=t -c user.email=t@example.org commit -qm one", target)
    return target


# every stage in seconds
CHANGES: dict[str, dict[str, Any]] = {
    "base": {"model": "data/model/tiny", "sha256": None},
    "sft": {"num_train_epochs": 1, "per_device_train_batch_size": 16, "logging_steps": 2},
    "dpo": {"num_train_epochs": 1, "per_device_train_batch_size": 16, "logging_steps": 2, "max_steps": 4},
    "template": {"max_length": 512},  # its tokens are short; with some seeds a pair is longer than the default's limit
    "lora": {"r": 2, "lora_alpha": 4},
    "merge": {"max_kl": 5.0, "prompts": 8},
    "evaluate": {"limit": 4, "max_new_tokens": 8, "bootstrap": 100},
    "pair": {"min_pairs": 1},
}
ORDER = [
    "base",
    "ingest",
    "validate",
    "split",
    "template",
    "sft",
    "pair",
    "reference",
    "dpo",
    "merge",
    "evaluate@base",
    "evaluate@sft",
    "evaluate@dpo",
    "report",
]


def edit(repo: Path, section: str, key: str, value: Any) -> None:
    """Set one value of params.yaml."""
    yaml = YAML()
    data = yaml.load(repo / "params.yaml")
    data[section][key] = value
    yaml.dump(data, repo / "params.yaml")


def ran(output: str) -> list[str]:
    """The stages whose command `dvc repro` ran, in its order."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def commit(repo: Path, message: str) -> None:
    run(f"git add -A && git -c user.name=t -c user.email=t@example.org commit -qm {message}", repo)


def changed(repo: Path) -> set[str]:
    """Stages whose own deps, params or outputs changed."""
    return set(json.loads(run("dvc status --json", repo).stdout.splitlines()[-1]))


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which the whole pipeline ran on the tiny model, committed; not to be changed, see `fork`.

    Its run cache outlives the session, so that only stages whose inputs changed since run again; a new environment, of
    which no stage knows, starts from nothing.
    """
    folder = clone(tmp_path_factory.mktemp("ran") / "repo")
    make_tiny(folder / "data/model/tiny")
    yaml = YAML()
    data = yaml.load(folder / "params.yaml")
    for section, changes in CHANGES.items():
        data[section] |= changes
    data["ingest"]["sources"][0] |= {"terms": 24, "invented": 16, "definitions_per_term": 1}
    yaml.dump(data, folder / "params.yaml")
    commit(folder, "tiny")
    # another number of threads may give other digits
    made_with = (ROOT / "requirements.lock").read_bytes() + os.environ["OMP_NUM_THREADS"].encode()
    key = hashlib.sha256(made_with).hexdigest()[:16]
    kept = ROOT / ".pytest_cache" / f"dvc-{key}"
    kept.parent.mkdir(exist_ok=True)
    with FileLock(kept.with_suffix(".lock")):  # of several workers one runs it, the others restore
        if kept.is_dir():
            shutil.copytree(kept, folder / ".dvc/cache", dirs_exist_ok=True)
        done = run("dvc repro", folder)
        assert len(ran(done.stdout)) + done.stdout.count("is cached - skipping run") == len(ORDER), done.stdout
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder / ".dvc/cache", kept)
    commit(folder, "ran")
    return folder


def fork(repo: Path, target: Path) -> Path:
    """A copy of a repository with its cache and outputs; neither sees what the other does."""
    run(["cp", "-a", "--reflink=auto", f"{repo}/.", str(target)], repo.parent)
    return target
