"""The harness of the benchmarks, without measuring anything."""

import time
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench import training
from tests import small


def process(script: str) -> training.Process:
    return training.Process("sft", "a peer", ["bash", "-c", script])


def test_turns_are_counted_from_the_first_answer_on() -> None:
    turn = training.TURN + '{"seconds": 2.0, "tokens": 100, "steps": 5}'
    with process(f"echo '{training.TURN}{{}}'; for i in 1 2; do read; echo '{turn}'; done; read; echo '{{}}'") as peer:
        peer.turn()
        peer.turn()
        assert (peer.rates(False), peer.rates(True)) == ([50.0, 50.0], [10.0, 10.0])
        assert peer.result() == {}


@pytest.mark.parametrize("before", ["", f"echo '{training.TURN}{{}}'; "])
def test_a_peer_that_hangs_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    monkeypatch.setattr(training, "PATIENCE", 3.0)
    started = time.monotonic()
    script = f"{before}sleep 60 & echo $! > {tmp_path}/pid; wait"  # the child holds its output open
    with pytest.raises(SystemExit, match="ended after 3 s without an answer"), process(script) as peer:
        peer.turn()
    assert time.monotonic() - started < 30
    child = int((tmp_path / "pid").read_text())
    small.until(lambda: not small.alive(child), 30, "its child lives on")


def test_a_peer_that_fails_says_why() -> None:
    with pytest.raises(SystemExit, match=r"bench: sft, a peer:\nno such thing"):
        process("echo no such thing >&2; exit 3")


def test_rates_of_two_parts_are_brought_to_one_speed_of_reforge() -> None:
    """The part measured while the machine was half as fast counts twice."""
    assert bench.scaled({"peer": 10.0, "gone": "does not run", training.BESIDE: 50.0}, {training.BESIDE: 100.0}) == {
        "peer": 20.0, "gone": "does not run", training.BESIDE: 100.0,
    }  # fmt: skip


def test_one_size_has_no_slope(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["data", "--rows", "10", "10"])
    assert "--rows: expected two sizes or more" in capsys.readouterr().err


def test_tokens_of_pairs_are_counted_as_trainers_count_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [{"prompt_ids": [1, 2, 3 + i], "chosen_ids": [9, 8], "rejected_ids": [9, 7, 6, 5]} for i in range(8)]
    monkeypatch.setattr(training, "rows", lambda: made)
    # four pairs: their answers; with prompts once each; without the two tokens that all begin with, and the one of a pair's answers
    answered, every, counted = 4 * 6, 4 * 9, 4 * 12
    assert training._counts(True) == (every, every - 3 * 2 - 4, answered, counted)
    assert training._counts(False) == (4 * 5, 4 * 5 - 3 * 2, 4 * 2, 4 * 5)
