"""A tiny random Llama with a real tokenizer and chat template, and a clone of the repository to run the pipeline in."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "passive",
}

import pytest

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
    from tasks import chat

    return chat.load_tokenizer(tiny)


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
