"""validate: every check rejects what it names and nothing beside it, and no row is ever lost."""

import json
import random
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rensa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from tasks import records as recs
from tasks import validate
from tasks.params import UserError, Validate

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
LONG = (
    "Kyphosis is a forward rounding of the upper back that may follow from weak bones, a slipped disc, or the way the "
    "spine grew; it is treated by exercise, by a brace, or in rare and severe cases by an operation, and most people "
    "who have it live without pain and need no more than a look at it once a year by the same doctor or nurse as before"
)
KOREAN = (
    "척추후만증은 등이 앞으로 둥글게 굽은 상태를 말합니다. 뼈가 약해지거나 디스크가 밀려나거나 "
    "성장기에 척추가 고르게 자라지 않아서 생길 수 있으며, 대부분은 운동과 보조기로 치료하고 "
    "아주 심한 경우에만 수술을 합니다. 통증이 없다면 일 년에 한 번 정도 진료를 받으면 충분합니다."
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of one token per word between spaces; its control tokens stand in three places."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "back": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<reponame>")])
    tokenizer.enable_truncation(4)  # as some models ship it: a length must be counted all the same
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "!", "unk_token": {"content": "[UNK]"}, "add_bos_token": True}
    config |= {"additional_special_tokens": ["<domain>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def chat(asked: str, answer: str, **more: Any) -> Row:
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"kind": "chat", "messages": turns} | more


def question(asked: str, **more: Any) -> Row:
    return {"kind": "question", "messages": [{"role": "user", "content": asked}]} | more


def preference(asked: str, chosen: str | None, rejected: str | None, **more: Any) -> Row:
    return question(asked, chosen=chosen, rejected=rejected) | {"kind": "preference"} | more


def choice(asked: str, options: list[str], answer: int) -> Row:
    return question(asked, options=options, answer=answer) | {"kind": "choice"}


class Result:
    """What a run wrote; rows are named by their line, which is their place in the list given, from 1."""

    def __init__(self, folder: Path, summary: str) -> None:
        self.summary = summary
        self.quarantine = [json.loads(line) for line in (folder / "q.jsonl").read_bytes().split(b"\n") if line]
        self.metrics = json.loads((folder / "m.json").read_text())
        self.out = recs.read(folder / "out.parquet") if (folder / "out.parquet").exists() else recs.frame([])
        self.kept = self.out["line"].to_list()
        self.failed = {
            row["line"]: [row["check"], *(other["check"] for other in row["also"])] for row in self.quarantine
        }


Run = Callable[..., Result]


def execute(folder: Path, base: Path, rows: list[Row], unread: list[Row], **params: Any) -> Result:
    common = {"source": "data/raw/a.jsonl", "license": "x", "concept": "c", "topic": "t", "task": "answer"}
    table = recs.frame({**common, "line": n, **row} for n, row in enumerate(rows, start=1))
    recs.write(table, folder / "in.parquet")
    recs.write_jsonl(unread, folder / "u.jsonl")
    return Result(folder, start(folder, base, **{"max_quarantine": 1.0} | params))


def start(folder: Path, base: Path, records: str = "in.parquet", unreadable: str = "u.jsonl", **params: Any) -> str:
    out, quarantine, metrics = (folder / name for name in ("out.parquet", "q.jsonl", "m.json"))
    return validate.run(folder / records, folder / unreadable, base, out, quarantine, metrics, Validate(**params))


@pytest.fixture
def run(tmp_path: Path, base: Path) -> Run:
    """Run the stage on these rows; two sound ones are appended, so that one is always left."""
    sound = [chat("Where is the femur?", "In the thigh."), question("Is it broken?")]

    def go(*rows: Row, unread: list[Row] | None = None, **params: Any) -> Result:
        return execute(tmp_path, base, [*rows, *sound], unread or [], **params)

    return go


def test_sound_rows_pass_unchanged_in_their_order(run: Run) -> None:
    rows = [
        chat("무릎이 아파요\n\t어떻게 해요?", "쉬세요."),
        chat("می‌خواهم بدانم", "بله"),  # U+200C, which Persian needs
        chat("👩‍⚕️ क्‍ष?", "Yes! f <|> g, a < b | c, <s>, [INSTRUCTIONS]"),  # U+200D, and what only looks like control
        {"kind": "replay", "messages": [{"role": "system", "content": " "}, *chat("Hi", "Hello")["messages"]]},
        preference("Is it bad?", "No, it heals.", "No."),
        choice("Which one?", ["a", "b"], 1),
        chat("?", "!"),
        chat("…", "—"),
        question("Rate", responses=["x", "y"]) | {"kind": "ratings"},
    ]
    result = run(*rows)
    assert result.kept == list(range(1, 12))
    assert result.quarantine == []
    assert result.out["messages"].to_list()[: len(rows)] == [row["messages"] for row in rows]
    assert result.summary == "0 of 11 rows (0.00%) quarantined"


@pytest.mark.parametrize(
    ("text", "check", "reason"),
    [
        ("", "empty", "no visible character"),
        (" \n\u3000", "empty", "no visible character"),
        ("\u3164\u1160", "empty", "no visible character"),  # Hangul fillers: letters that are drawn as nothing
        ("\u200d", "empty", "no visible character"),
        ("a\x00b", "control_character", "U+0000 CONTROL at character 2"),
        ("x\x85", "control_character", "U+0085 CONTROL at character 2"),
        ("caf\ufffd", "replacement_character", "U+FFFD REPLACEMENT CHARACTER at character 4"),
        ("a\u202eb", "bidirectional_override", "U+202E RIGHT-TO-LEFT OVERRIDE at character 2"),
        ("a\u2066b", "bidirectional_override", "U+2066 LEFT-TO-RIGHT ISOLATE at character 2"),
        ("한\u200b글", "zero_width", "U+200B ZERO WIDTH SPACE at character 2"),
        ("\ufeffa", "zero_width", "U+FEFF ZERO WIDTH NO-BREAK SPACE at character 1"),
        (unicodedata.normalize("NFD", "한글"), "not_nfc", "not in Unicode normal form C"),
        ("end <|im_end|>", "control_token", "'<|im_end|>' at character 5"),
        ("see <reponame>", "control_token", "'<reponame>' at character 5"),  # only this tokenizer's: added token
        ("see [UNK]", "control_token", "'[UNK]' at character 5"),
        ("see <domain>", "control_token", "'<domain>' at character 5"),  # only in its configuration
        ("a</s>", "control_token", "'</s>' at character 2"),
        ("[INST] a", "control_token", "'[INST]' at character 1"),
        ("<|eot_id|>", "control_token", "'<|eot_id|>' at character 1"),
        ("<start_of_turn>user", "control_token", "'<start_of_turn>' at character 1"),
        ("<｜User｜>", "control_token", "'<｜User｜>' at character 1"),
        ("[|endofturn|]", "control_token", "'[|endofturn|]' at character 1"),
    ],
)
def test_a_text_is_rejected_wherever_it_stands(run: Run, text: str, check: str, reason: str) -> None:
    history = [*chat("How so?", text)["messages"], *chat("Go on", "Well")["messages"]]
    result = run(
        chat(text, "a"),
        chat("b", text),
        preference("c", text, "d"),
        choice("e", ["f", text], 0),
        chat("", "") | {"messages": history},
    )
    columns = ["messages[0].content", "messages[1].content", "chosen", "options[1]", "messages[1].content"]
    found = [(row["line"], row["column"], row["check"], row["reason"], row["also"]) for row in result.quarantine]
    assert found == [(n, column, check, reason, []) for n, column in enumerate(columns, start=1)]
    assert result.metrics["checks"] == {check: 5}
    assert result.kept == [6, 7]


@pytest.mark.parametrize(
    "row",
    [
        chat("a", "b") | {"messages": []},
        preference("a", None, "b"),
        preference("a", "b", None),
        choice("a", [], 0),
        question("a", responses=[]) | {"kind": "ratings"},
    ],
)
def test_what_is_missing_is_empty(run: Run, row: Row) -> None:
    assert "empty" in run(row).failed[1]


def test_length_counts_messages_and_the_longest_answer(run: Run) -> None:
    rows = [
        chat("a b c d e f", "g h"),
        chat("a b c d e f", "g h i"),
        preference("a b c d", "e f g h", "i j k"),
        preference("a b c d", "e f", "g h i j k"),
        choice("a b c d e f", ["g", "h i j"], 0),
        {"kind": "chat", "messages": [{"role": "system", "content": "a b c d e"}, *chat("f g", "h i")["messages"]]},
    ]
    result = run(*rows, max_tokens=8)
    assert result.failed == {n: ["too_long"] for n in (2, 4, 5, 6)}
    assert result.quarantine[0]["reason"] == "9 tokens, at most 8 (validate.max_tokens)"
    assert result.metrics["tokens"] == {"p50": 7, "p95": 8, "max": 8}  # of 8, 8, and the 7 and 3 of the fixture


def test_last_turn_and_same_answers(run: Run) -> None:
    asked = question("What now?")["messages"]
    result = run(
        {"kind": "chat", "messages": asked},
        {"kind": "question", "messages": chat("a", "b")["messages"]},
        preference("a", "same", " same\n"),
        preference("a", "Same", "same"),
    )
    assert result.failed == {1: ["last_turn"], 2: ["last_turn"], 3: ["same_answers"]}


def test_duplicates_keep_the_first(run: Run) -> None:
    result = run(
        chat("What is it?", "A bone."),
        chat(" what  IS it?\n", "a bone.", source="data/raw/b.jsonl"),
        chat("What is it?", "A bone."),  # of one source: the id is the same as well
        {"kind": "replay", "messages": chat("What is it?", "A bone.")["messages"]},
        preference("What is it?", "A bone.", "Guess."),
        preference("What is it?", "A bone.", "Find out."),
    )
    assert result.failed == {2: ["duplicate"], 3: ["duplicate"]}
    assert result.quarantine[0]["reason"] == "the same text as data/raw/a.jsonl:1"


def test_near_duplicates_of_words(run: Run) -> None:
    other = LONG.replace("upper", "lower").replace("brace", "belt").replace("nurse", "friend").replace("rare", "few")
    result = run(
        chat("What is kyphosis?", LONG),
        chat("What is “kyphosis”", LONG.upper() + "!"),  # punctuation and capitals only
        chat("What is kyphosis?", LONG.replace("rounding", "bending"), wording="train"),  # fixed wording: exempt …
        chat("What is a kyphosis?", LONG.replace("as before", "as ever")),
        chat("What is kyphosis then?", other),  # below the threshold
        preference("What is kyphosis?", LONG, "Dunno."),  # another kind
        preference("What is kyphosis?", LONG, "Dunno!"),
    )
    assert result.failed == {1: ["contradiction"], 3: ["contradiction"], 4: ["near_duplicate"], 7: ["near_duplicate"]}
    # … but not from contradiction, and what contradicts displaces nothing: 4 is a copy of 2, not of 1
    assert result.quarantine[2]["reason"].endswith("similar to data/raw/a.jsonl:2")
    assert run(chat("a", LONG), chat("b", LONG), near_duplicate=1.0).failed == {}
    assert run(chat("a", LONG, wording="train"), chat("b", LONG, wording="train")).failed == {}


def test_a_near_copy_in_training_costs_the_test_no_row(run: Run) -> None:
    rows = chat("What is kyphosis?", LONG), chat("What is “kyphosis” then?", LONG + "!", split="test")
    result = run(*rows)
    assert result.failed == {1: ["near_duplicate"]}
    assert result.quarantine[0]["reason"].endswith("similar to data/raw/a.jsonl:2")


def test_near_duplicates_in_korean_are_compared_by_characters(run: Run) -> None:
    copy = KOREAN.replace("굽은", "휘어진")

    def by_words(text: str) -> set[str]:
        words = text.split()
        return {" ".join(words[n : n + 3]) for n in range(len(words) - 2)}

    assert len(by_words(KOREAN) & by_words(copy)) / len(by_words(KOREAN) | by_words(copy)) < 0.85
    result = run(
        chat("이게 뭐예요?", KOREAN), chat("이게 뭐예요", copy), chat("등이 굽었어요", KOREAN[:60]), near_duplicate=0.85
    )
    assert result.failed == {2: ["near_duplicate"]}
    spaced = chat("척추후만증이 뭐예요?", KOREAN), chat("척추 후만증이 뭐예요?", KOREAN.replace("앞으로", "앞 으로"))
    assert run(*spaced).failed == {2: ["near_duplicate"]}  # spacing, which Koreans set freely, does not matter


def test_a_shared_system_message_makes_no_near_duplicates(run: Run) -> None:
    system = {"role": "system", "content": " ".join(f"w{n}" for n in range(300))}
    rows = [chat(f"Is {word} one?", f"{word}, yes") for word in ("hip", "rib", "toe")]
    assert run(*({**row, "messages": [system, *row["messages"]]} for row in rows)).failed == {}


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9, 1.0])
def test_near_duplicates_are_those_of_all_pairs(threshold: float) -> None:
    rng = random.Random(0)
    vocabulary = [f"w{n}" for n in range(500)]
    texts: dict[int, str] = {}
    for n in range(0, 160, 4):
        words = rng.choices(vocabulary, k=60)
        for k, edits in enumerate((0, 0, 1, 4)):
            changed = list(words)
            for at in rng.sample(range(60), edits):
                changed[at] = "new"
            texts[n + k] = " ".join(changed)
    expected: dict[int, tuple[int, float]] = {}
    for i in texts:
        mine = validate._shingles(texts[i])
        for j in range(i):
            other = validate._shingles(texts[j])
            if j not in expected and (similarity := len(mine & other) / len(mine | other)) >= threshold:
                expected[i] = j, similarity
                break
    found = validate._near({i: (text, text) for i, text in texts.items()}, threshold)
    assert found.keys() == expected.keys()
    assert len(expected) >= 40


def test_questions_about_one_passage_are_no_copies(run: Run) -> None:
    draw = random.Random(1)
    passage = " ".join(f"word{draw.randrange(9999)}" for _ in range(500))
    rows = [
        chat(f"{passage} What does clause {n} say of party {n + 3}?", f"It grants right {n * 7} to {n}.")
        for n in range(5)
    ]
    assert run(*rows).failed == {}
    answer = f"It grants {passage} to all."
    again = [chat(f"{passage} What does clause {n} say?", answer) for n in range(2)]
    assert run(*again).failed == {2: ["near_duplicate"]}


def test_work_is_linear_where_a_template_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    template = " ".join(f"w{n}" for n in range(40))  # similarity 0.83: all collide, none is a copy
    texts = {n: f"define t{n} {template} q{n} z{n}" for n in range(400)} | {400: f"define, t7 {template} q7 z7"}
    shingled, estimated = [0], [0]
    shingles, sketches = validate._shingles, rensa.RMinHash

    def counting(text: str) -> set[str]:
        shingled[0] += 1
        return shingles(text)

    class Sketch:
        def __init__(self, *arguments: int) -> None:
            self.of = sketches(*arguments)
            self.update, self.digest = self.of.update, self.of.digest

        def jaccard(self, other: "Sketch") -> Any:
            estimated[0] += 1
            return self.of.jaccard(other.of)

    monkeypatch.setattr(validate, "_shingles", counting)
    monkeypatch.setattr(rensa, "RMinHash", Sketch)
    assert validate._near({i: (text, text) for i, text in texts.items()}, 0.9) == {400: (7, 1.0)}
    assert shingled[0] <= len(texts) * (1 + validate.CANDIDATES)  # of 80,000 pairs
    assert estimated[0] <= len(texts) * validate.CANDIDATES * 16  # 16 bands of 8 permutations


def test_a_system_message_makes_another_prompt(run: Run) -> None:
    rows = chat("Say it", "It"), chat("Say it", "It") | {"kind": "replay"}
    systems = [{"role": "system", "content": text} for text in ("Be kind.", "Be short.", " be SHORT.")]
    assert run(*rows, *({**rows[0], "messages": [s, *rows[0]["messages"]]} for s in systems)).failed == {
        5: ["duplicate"]
    }


def test_contradictions_name_each_other(run: Run) -> None:
    system = {"role": "system", "content": "Answer in Latin."}
    result = run(
        chat("Which word?", "Lipoma.", wording="train"),
        chat("which  word?", "Fibroma.", wording="train"),
        chat("Which word?", "lipoma.", wording="train"),  # the first once more
        {"kind": "chat", "messages": [system, *chat("Which word?", "Adeps.")["messages"]]},
        {"kind": "replay", "messages": chat("Which word?", "Any.")["messages"]},
        choice("Best?", ["a", "b"], 0),
        choice("Best?", ["b", "a"], 0),
        choice("Best?", ["a", "b"], 1),
        preference("Say", "x", "y"),
        preference("Say", "y", "x"),
        preference("Say", "z", "x"),
    )
    assert result.failed == {n: ["contradiction"] for n in (1, 2, 6, 7, 8, 9, 10)} | {3: ["duplicate"]}
    assert result.quarantine[0]["reason"] == "the same chat prompt is answered otherwise at data/raw/a.jsonl:2"


def test_many_contradictions_name_five(run: Run) -> None:
    result = run(*(chat("Hi", f"{n}") for n in range(9)))
    first, last = result.quarantine[0]["reason"], result.quarantine[8]["reason"]
    assert first.endswith("at " + ", ".join(f"data/raw/a.jsonl:{n}" for n in range(2, 7)) + " and 3 more")
    assert last.endswith("at " + ", ".join(f"data/raw/a.jsonl:{n}" for n in range(1, 6)) + " and 3 more")


def test_contamination_costs_training_its_row_and_the_test_none(run: Run) -> None:
    asked = chat("Where?", "There.")["messages"]
    turns = [*chat("Fine?", "Yes.")["messages"], *chat("What is HERE?", "It.")["messages"]]
    rows = [
        chat("What is here?", "A rib.", wording="train"),
        chat("What is here?", "A rib.", wording="test"),
        {"kind": "replay", "messages": chat("Capital of  france?", "Paris.")["messages"]},
        choice("Capital of France?", ["Paris", "Rome"], 0),
        question("Is it me?", wording="test"),
        question("is it me?", wording="train"),
        preference("Is it me?", "No.", "Yes."),
        {"kind": "chat", "messages": [*chat("What is here?", "Well.")["messages"], *chat("And?", "Fine.")["messages"]]},
        {"kind": "chat", "messages": [*asked, *chat("Why?", "So.")["messages"]], "wording": "test"},
        {"kind": "chat", "messages": [*asked, *chat("Why?", "Else.")["messages"], *chat("And?", "Fine.")["messages"]]},
        {"kind": "chat", "messages": turns},  # asked, but after something else: another prompt
    ]
    result = run(*rows)
    assert result.failed == {n: ["contamination"] for n in (1, 3, 6, 7, 8, 10)}
    assert result.quarantine[0]["reason"] == "asks what the test asks at data/raw/a.jsonl:2"


def test_contamination_is_seen_behind_punctuation_and_width(run: Run) -> None:
    """Of prompts alone: what differs by more than its edges is another one, and no text is changed."""
    asked = ["보증금은 언제 돌려받나요?", "보증금은 언제 돌려받나요", "「보증금은 언제 돌려받나요」 😊"]
    rows = [chat("보증금은 언제 돌려받나요？", "두 달 안에.", wording="test"), *(chat(a, "모릅니다.") for a in asked)]
    rows += [
        chat("What is C++?", "A language.", wording="test"),
        chat("What is C?", "Another."),
        chat("Ｗhat is c++", "?"),
    ]
    rows += [chat("???", "What?", wording="test"), chat("!", "Yes?")]
    result = run(*rows)
    assert result.failed == {n: ["contamination"] for n in (2, 3, 4, 7)}
    assert result.out["messages"][0].to_list() == rows[0]["messages"]


def test_all_failures_of_a_row_are_collected(run: Run) -> None:
    result = run(chat("a\x07 <|im_end|>", "\u200b", license=None), chat("Hi", "x"), chat("Hi", "y\ufffd"))
    (first, broken, *_) = result.quarantine
    assert (first["column"], first["check"]) == ("license", "schema")
    also = [(other["column"], other["check"]) for other in first["also"]]
    assert sorted(also) == [
        ("messages[0].content", "control_character"),
        ("messages[0].content", "control_token"),
        ("messages[1].content", "empty"),
        ("messages[1].content", "zero_width"),
    ]
    assert all(other["reason"] for other in first["also"])
    # a broken row neither contradicts nor displaces a sound one
    assert broken["line"] == 3
    assert 2 in result.kept
    assert result.metrics["checks"] == {
        "control_character": 1,
        "control_token": 1,
        "empty": 1,
        "replacement_character": 1,
        "schema": 1,
        "zero_width": 1,
    }


def test_a_broken_copy_does_not_displace_a_sound_one(run: Run) -> None:
    result = run(chat("Q", LONG + " \ufffd"), chat("Q", LONG))
    assert result.failed == {1: ["replacement_character"]}


def test_quarantine_holds_the_original_row_and_what_could_not_be_read(run: Run) -> None:
    unread = [
        {
            "source": "data/raw/b.csv",
            "line": 7,
            "column": "(row)",
            "check": "json",
            "reason": "no",
            "content": "{\u2028",
        }
    ]
    result = run(chat("a", "\x1b[0m", term="t"), unread=unread)
    first, second = result.quarantine
    assert first["content"]["messages"][1] == {"role": "assistant", "content": "\x1b[0m"}
    assert first["content"]["term"] == "t"
    assert set(first["content"]) == set(recs.RECORD)
    assert second == {**unread[0], "also": []}
    assert result.metrics["sources"]["data/raw/b.csv"] == {"rows_in": 1, "quarantined": 1}
    assert (result.metrics["rows_in"], result.metrics["rows_out"], result.metrics["quarantined"]) == (4, 2, 2)


def test_values_that_the_schema_forbids(run: Run) -> None:
    result = run(chat("a", "b", id="XYZ"), chat("c", "d", license=None), chat("e", "f", kind="poem") | {"kind": "poem"})
    assert [(row["line"], row["column"], row["check"]) for row in result.quarantine] == [
        (1, "id", "schema"),
        (2, "license", "schema"),
        (3, "kind", "schema"),
    ]
    assert "'preference'" in result.quarantine[2]["reason"]
    assert "poem" in result.quarantine[2]["reason"]


def test_more_than_the_limit_fails_and_says_what_to_look_at(run: Run, tmp_path: Path) -> None:
    rows = [chat(f"q{n}", "" if n % 2 else "a\x07") for n in range(5)]
    with pytest.raises(UserError) as error:
        run(*rows, max_quarantine=0.7)
    assert str(error.value) == (
        "5 of 7 rows (71.43%) quarantined, at most 70.00% (validate.max_quarantine): control_character 3 (as "
        f"data/raw/a.jsonl:1), empty 2 (as data/raw/a.jsonl:2); look at {tmp_path / 'q.jsonl'}"
    )
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 5
    assert json.loads((tmp_path / "m.json").read_text())["quarantined_share"] == 0.714286
    assert not (tmp_path / "out.parquet").exists()
    assert run(*rows, max_quarantine=5 / 7).kept == [6, 7]


def test_a_source_that_is_lost_as_a_whole_fails(run: Run, tmp_path: Path) -> None:
    """However few its rows are beside the others; copies of others are nothing lost."""
    rows = [chat(f"q{n}", f"a{n}") for n in range(98)]
    bad = {"line": 3, "column": "answer", "check": "type", "reason": "expected text", "content": "{}"}
    test = "data/raw/law_test.jsonl"
    with pytest.raises(UserError) as error:
        run(*rows, chat("q", "", source=test), unread=[bad | {"source": test}], max_quarantine=0.05)
    assert str(error.value).startswith(
        f"{test}: all 2 rows are quarantined: empty (line 99: no visible character), type (line 3: expected text); look"
    )
    assert not (tmp_path / "out.parquet").exists()
    assert run(*rows, chat("q", "", source=test), chat("q", "r", source=test), max_quarantine=0.05).kept[-1] == 102
    assert run(*rows, chat("q", "", source=test), max_quarantine=1.0).kept
    result = run(*rows, *({**row, "source": test} for row in rows[:2]), max_quarantine=0.05)
    assert result.metrics["warnings"] == [f"warning: {test}: all 2 rows are copies of others"]


def test_no_row_left_fails(tmp_path: Path, base: Path) -> None:
    with pytest.raises(UserError, match=r"1 of 1 rows \(100.00%\) quarantined, no row is left: empty 1"):
        execute(tmp_path, base, [chat("", "a")], [])


def test_topics(run: Run) -> None:
    rows = [chat(f"q{n}", f"a{n}", topic="skin") for n in range(8)]
    result = run(*rows, max_topic_share=0.85)
    assert result.metrics["topics"] == {"skin": {"rows": 8, "share": 0.888889}, "t": {"rows": 1, "share": 0.111111}}
    warning = "warning: topic 'skin' is 88.9% of the chat rows, above 85.0% (validate.max_topic_share)"
    assert result.metrics["warnings"] == [warning]
    assert result.summary == f"0 of 10 rows (0.00%) quarantined; {warning}"
    assert run(*rows, max_topic_share=0.9).metrics["warnings"] == []
    assert run(rows[0], max_topic_share=0.5).metrics["warnings"] == []
    assert run(*({**row, "topic": "t"} for row in rows)).metrics["warnings"] == []  # one topic: nothing to balance


def test_remains_of_web_pages_are_counted(run: Run) -> None:
    """A warning: what is about HTML has it too."""
    rows = [
        chat("a < b & c > d; <s>", "x<y>z & p > q"),
        chat("질문<br/>둘", "답&nbsp;하나"),
        preference("q", '<p class="x">', "b"),
    ]
    result = run(*rows)
    assert result.quarantine == []
    assert result.metrics["warnings"] == ["warning: 2 rows hold HTML such as <br/>"]
    assert result.summary.endswith("; warning: 2 rows hold HTML such as <br/>")
    assert run(rows[2]).metrics["warnings"] == ['warning: 1 row holds HTML such as <p class="x">']
    assert run(rows[0]).metrics["warnings"] == []


def test_wrong_inputs_are_named(tmp_path: Path, base: Path) -> None:
    execute(tmp_path, base, [chat("a", "b")], [])
    (tmp_path / "in2.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match=r"in2\.parquet: can't be read"):
        start(tmp_path, base, records="in2.parquet")
    recs.read(tmp_path / "in.parquet").drop("topic").write_parquet(tmp_path / "in3.parquet")
    with pytest.raises(UserError, match=r"in3\.parquet: no table of records: columns: .*found topic"):
        start(tmp_path, base, records="in3.parquet")
    (tmp_path / "u2.jsonl").write_text('{"source": "a"}\n')
    with pytest.raises(UserError, match=r"u2\.jsonl: can't be read as what ingest writes"):
        start(tmp_path, base, unreadable="u2.jsonl")
    with pytest.raises(UserError, match=r"tokenizer\.json: can't be read as a tokenizer"):
        start(tmp_path, tmp_path)


pieces = st.sampled_from(
    ["", " ", "a", "A", "b c", "뼈", "\x00", "\ufffd", "\u200b", "</s>", "e\u0301", LONG, LONG + " x"]
)
texts = st.lists(pieces, max_size=2).map("".join)
wordings = st.sampled_from([None, "train", "validation", "test"])
any_row = st.one_of(
    st.builds(chat, texts, texts, wording=wordings, kind=st.sampled_from(["chat", "replay"])),
    st.builds(question, texts, wording=wordings),
    st.builds(preference, texts, texts, texts),
    st.builds(lambda asked, right: choice(asked, ["a", "b"], right), texts, st.sampled_from([0, 1])),
)
unread_row = st.builds(
    lambda content: {"source": "u", "line": 1, "column": "c", "check": "json", "reason": "r", "content": content}, texts
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(any_row, max_size=12), unread=st.lists(unread_row, max_size=3))
def test_no_row_is_ever_lost(tmp_path: Path, base: Path, rows: list[Row], unread: list[Row]) -> None:
    (tmp_path / "out.parquet").unlink(missing_ok=True)
    paths = [tmp_path / "q.jsonl", tmp_path / "m.json"]
    try:
        result = execute(tmp_path, base, rows, unread)
    except UserError:  # no row is left
        result = Result(tmp_path, "")
        assert result.metrics["rows_out"] == 0
    lines = [row["line"] for row in result.quarantine[: len(result.quarantine) - len(unread)]]
    assert sorted([*result.kept, *lines]) == list(range(1, len(rows) + 1))  # each row once, here or there
    assert result.kept == sorted(result.kept)
    assert [row["content"] for row in result.quarantine[len(lines) :]] == [row["content"] for row in unread]
    for row in result.quarantine[: len(lines)]:
        assert row["content"]["messages"] == rows[row["line"] - 1]["messages"]
    assert result.metrics["rows_in"] == len(rows) + len(unread)
    assert sum(result.metrics["kinds"].values()) == result.metrics["rows_out"] == len(result.kept)
    if result.kept:  # what was let through is let through again, and the same input gives the same bytes
        bytes_before = [path.read_bytes() for path in [*paths, tmp_path / "out.parquet"]]
        execute(tmp_path, base, rows, unread)
        assert [path.read_bytes() for path in [*paths, tmp_path / "out.parquet"]] == bytes_before
        (again := tmp_path / "again").mkdir(exist_ok=True)
        assert execute(again, base, result.out.to_dicts(), []).quarantine == []


def test_it_starts_without_torch(tmp_path: Path, base: Path) -> None:
    execute(tmp_path, base, [chat("a", "b")], [])
    code = (
        "import sys; from pathlib import Path; from tasks import params, validate; p = list(map(Path, sys.argv[1:]));"
        "validate.run(*p, params.Validate());"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    arguments = [tmp_path / "in.parquet", tmp_path / "u.jsonl", base, *(tmp_path / name for name in ("o", "q", "m"))]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
