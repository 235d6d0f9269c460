"""Every key is known, typed and possible; every shipped params file parses."""

import copy
import dataclasses
import subprocess
import sys

import pytest
from ruamel.yaml import YAML

from tasks import params
from tests.conftest import ROOT

RAW = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())


def with_(**changes: object) -> dict:
    raw = copy.deepcopy(RAW)
    for path, value in changes.items():
        node, *rest = path.split("__")
        target = raw
        for part in [node, *rest][:-1]:
            target = target.setdefault(part, {})
        target[[node, *rest][-1]] = value
    return raw


def test_shipped_file_is_valid() -> None:
    assert params.check(RAW)["lora"]["r"] == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantizaton": {"load_in_4bit": True}}, "quantizaton: unknown section, did you mean `quantization`?"),
        ({"sft__learning_rat": 1e-4}, "sft.learning_rat: unknown key, did you mean `learning_rate`?"),
        ({"sft__learning_rate": "fast"}, "sft.learning_rate: expected float, found 'fast'"),
        ({"sft__num_train_epochs": 0}, "sft.num_train_epochs: expected a number > 0, found 0"),
        ({"sft__warmup_ratio": 0.1}, "a `warmup_steps` below 1 is the ratio"),
        ({"sft__seed": 1}, "set the top-level `seed`"),
        ({"lora__r": 0}, "lora.r: expected an integer ≥ 1, found 0"),
        ({"lora__lora_dropout": 1.0}, "lora.lora_dropout"),
        ({"lora__init_lora_weights": "pissa"}, "lora.init_lora_weights: expected true, false, gaussian"),
        ({"lora__lora_alfa": 3}, "did you mean `lora_alpha`?"),
        ({"dpo__beta": -1.0}, "dpo.beta: expected a number > 0, found -1.0"),
        ({"dpo__loss_type": "sigmoid"}, "dpo.loss_type: expected list[str]"),
        ({"dpo__loss_weights": [1.0, 2.0, 3.0]}, "one weight for each entry"),
        ({"quantization__load_in_4bits": True}, "did you mean `load_in_4bit`?"),
        ({"quantization__load_in_8bit": True}, "exclude each other"),
        ({"quantization": {"load_in_4bit": False}}, "write `quantization: null`"),
        ({"quantization__bnb_4bit_quant_type": "nf5"}, "nf4 or fp4"),
        ({"validate__max_quarantine": 2.0}, "validate.max_quarantine"),
        ({"validate__max_quarantin": 0.1}, "did you mean `max_quarantine`?"),
        ({"base__model": "org/name"}, "base.revision: required"),
        ({"base__sha256": None}, "base.sha256: required"),
        ({"base__trust_remote_code": True}, "base.trust_remote_code: unknown key"),
        ({"evaluate__metrics": ["tasks"]}, "evaluate.metrics: expected a folder below tasks/metrics/, found 'tasks'"),
        ({"evaluate__metrics": ["/my/metric"]}, "evaluate.metrics: expected a folder below tasks/metrics/"),
        ({"ingest__sources": []}, "ingest.sources"),
        ({"ingest__sources": [{"path": "/etc/passwd"}]}, "below data/raw/"),
        ({"ingest__sources": [{"path": "data/raw/x", "hub": "y"}]}, "exactly one of"),
        ({"ingest__sources": [{"hub": "org/y"}]}, "revision: required"),
        ({"ingest__sources": [{"path": "data/raw/x", "knd": "chat"}]}, "did you mean `kind`?"),
        ({"seed": "x"}, "seed: expected an integer"),
        ({"generation__temperatur": 1.0}, "did you mean `temperature`?"),
        ({"template": 3}, "template: expected keys, found 3"),
        ({"sft__packing": True}, "sft.packing: not settable here"),
        ({"dpo__ld_alpha": 0.5}, "dpo.ld_alpha: not settable here"),
        ({"dpo__use_cpu": True}, "the device is chosen by itself"),
        ({"base__chat_template_kwargs": {"messages": None}}, "'messages' is not for params to set in a template"),
        ({"base__chat_template_kwargs": {"a = 1 %}": 1}}, "'a = 1 %}' is not for params to set in a template"),
        (
            {"ingest__sources": [{"path": "data/raw/x", "revision": "1"}]},
            "sources.0.revision: has no effect beside `path`",
        ),
        (
            {"ingest__sources": [{"path": "data/raw/x", "split": "dev"}]},
            "split: expected train, validation, test, found 'dev'",
        ),
        (
            {"ingest__sources": [{"path": "data/raw/x", "kind": "question", "topic": "law"}]},
            "expected advice or outside, found 'law'",
        ),
        ({"base__model": "org/name", "base__revision": "1", "base__sha256": "0"}, "base.sha256: only a single file"),
        ({"evaluate__metrics": ["rouge"]}, "evaluate.metrics: expected a folder below tasks/metrics/, found 'rouge'"),
        ({"lora__bias": "all"}, "lora.bias: expected none"),
        ({"lora__lora_bias": True}, "lora.lora_bias: not settable here"),
        ({"lora__alora_invocation_tokens": [1]}, "lora.alora_invocation_tokens: not settable here"),
        ({"lora__layer_replication": [[0, 2], [1, 3]]}, "lora.layer_replication: not settable here"),
        ({"lora__runtime_config": {}}, "lora.runtime_config: not settable here"),
        ({"sft__logging_strategy": "no"}, "sft.logging_strategy: expected `steps` or `epoch`, found 'no'"),
        ({"dpo__logging_strategy": "no"}, "dpo.logging_strategy: expected `steps` or `epoch`, found 'no'"),
        (
            {"sft__early_stopping_patience": 2, "sft__eval_strategy": "no"},
            "sft.early_stopping_patience: needs sft.eval_strategy",
        ),
        ({"dpo__early_stopping_threshold": 0.1}, "dpo.early_stopping_threshold: has no effect without"),
        ({"sft__logging_nan_inf_filter": True}, "a loss that is no number ends the training"),
        ({"dpo__padding_free": True}, "dpo.padding_free: not settable here"),
        ({"generation__eos_token_id": [1, 2]}, "generation.eos_token_id: not settable here"),
    ],
)
def test_refused_with_the_key(changes: dict, message: str) -> None:
    with pytest.raises(params.UserError) as caught:
        params.check(with_(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_variant_of_lora_is_trained_as_one_or_refused() -> None:
    """peft 0.21.2 knows of each variant where its layers are `nn.Linear`; of most it knows nothing where they are quantised."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft import LoraConfig
    from peft.tuners.lora import bnb

    variants = {f.name for f in dataclasses.fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    open_ones = variants - params.RESERVED["lora"].keys()
    assert open_ones == {"use_dora", "velora_config"}
    for kind, base in ((bnb.Linear4bit, Linear4bit), (bnb.Linear8bitLt, Linear8bitLt)):
        layer = kind(base(8, 8), "default", LoraConfig(r=2), r=2)
        assert type(layer.resolve_lora_variant(config=LoraConfig(use_dora=True))).__name__ == "DoraLinearVariant"
        with pytest.raises(ValueError, match="does not support VeLoRA"):
            layer.resolve_lora_variant(config=LoraConfig(velora_config={}))


def test_what_only_another_start_of_lora_reads_is_refused() -> None:
    """`init_lora_weights` takes no method with a config of its own."""
    from peft import LoraConfig

    configs = {f.name for f in dataclasses.fields(LoraConfig) if f.name.endswith("_config")}
    assert configs - params.RESERVED["lora"].keys() == {"velora_config"}


def test_all_faults_at_once() -> None:
    with pytest.raises(params.UserError, match=r"lorra.*sft\.learning_rat"):
        params.check(with_(lorra={}, sft__learning_rat=1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("- a\n", "expected sections, found list"),
        ("", "expected sections, found NoneType"),
    ],
)
def test_broken_files(tmp_path, text: str, message: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(params.UserError, match=message):
        params.load(tmp_path / "params.yaml")


def test_a_float_without_a_point_is_a_float(tmp_path) -> None:
    text = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("6.0e-4", "6e-4"))
    assert params.load(tmp_path / "params.yaml")["sft"]["learning_rate"] == 6e-4


def test_fields_are_those_of_the_installed_classes() -> None:
    from peft import LoraConfig
    from trl import DPOConfig, SFTConfig

    for section, config in (("sft", SFTConfig), ("dpo", DPOConfig), ("lora", LoraConfig)):
        real = {field.name for field in dataclasses.fields(config) if not field.name.startswith("_")}
        assert real <= set(params.fields(section)), section
        assert not set(params.RESERVED[section]) - real - {"warmup_ratio"}, section


def test_generation_and_quantization_fields_reach_their_class() -> None:
    from transformers import BitsAndBytesConfig, GenerationConfig

    assert vars(GenerationConfig()).keys() - set(params.fields("generation")) <= {
        "transformers_version",
        "_from_model_config",
        "_commit_hash",
        "generation_kwargs",
        "_original_object_hash",
        "_user_provided_keys",
    } | {k for k in vars(GenerationConfig()) if k.startswith("_")}
    for key in params.fields("quantization"):
        if key not in params.RESERVED["quantization"] and key != "kwargs":
            assert hasattr(BitsAndBytesConfig(), key), key


def test_nearest_target_module() -> None:
    facts = {"linear_modules": ["q_proj", "v_proj"], "model": "m"}
    params.check_model({"target_modules": ["q_proj"]}, facts)
    params.check_model({"target_modules": "all-linear"}, facts)
    with pytest.raises(params.UserError, match="did you mean `q_proj`"):
        params.check_model({"target_modules": ["q_projj"]}, facts)


def test_checking_loads_no_torch() -> None:
    code = (
        "import sys; from tasks import params, records, split, ingest; params.load(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
