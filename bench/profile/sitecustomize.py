"""Where a stage's seconds go: on PYTHONPATH of `dvc repro`, each stage's main thread is looked at 50 times a second.

A look counts for the first of `PARTS` that the stack is inside of, the innermost function first; else for `work`. Each
stage leaves `seconds` by part in $REFORGE_PROFILE/<name of the stage>.json. See `bench.stages`.
"""

import atexit
import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path

EVERY = 0.02  # seconds
# part → (file, function) that it is inside of
PARTS = {
    "start": {("<frozen importlib._bootstrap>", "_find_and_load"), ("params.py", "load")},
    "load": {
        ("models.py", "load"), ("models.py", "load_adapter"), ("models.py", "new_adapter"), ("models.py", "load_merged"),
        ("auto_factory.py", "from_pretrained"), ("tokenization_auto.py", "from_pretrained"),  # which `base` calls itself
        ("render.py", "load_tokenizer"), ("records.py", "read"),
    },
    "save": {
        ("models.py", "save_adapter"), ("modeling_utils.py", "save_pretrained"), ("training.py", "on_save"),
        ("trainer.py", "_save_checkpoint"), ("records.py", "write"), ("records.py", "write_jsonl"),
    },
}  # fmt: skip
INSIDE = {place: part for part, places in PARTS.items() for place in places}


def part_of(frame: object) -> str:
    while frame is not None:
        code = frame.f_code  # type: ignore[attr-defined]
        if part := INSIDE.get((code.co_filename.rpartition("/")[2], code.co_name)):
            return part
        frame = frame.f_back  # type: ignore[attr-defined]
    return "work"


def watch() -> None:
    began, main = time.perf_counter(), threading.main_thread().ident
    seen: Counter[str] = Counter()

    def look() -> None:
        while True:
            time.sleep(EVERY)
            seen[part_of(sys._current_frames().get(main or 0))] += 1

    def leave() -> None:
        seconds = time.perf_counter() - began
        counts = dict(seen)
        found = {part: seconds * count / sum(counts.values()) for part, count in counts.items()}
        name = os.environ["DVC_STAGE"]
        (Path(os.environ["REFORGE_PROFILE"]) / f"{name}.json").write_text(json.dumps(found))

    atexit.register(leave)
    threading.Thread(target=look, name="profile", daemon=True).start()


if "REFORGE_PROFILE" in os.environ and "DVC_STAGE" in os.environ and "-m" in sys.orig_argv:
    watch()
