"""How a stage starts and ends: its command line, its params, its errors, its summary.

A stage module ends in `if __name__ == "__main__": stage.main(run)`. The signature of `run` is the command line: every
`Path` is a required option of the same name, every other parameter is read from `params.yaml`: `params` is the section
named after the stage, `seed` and the rest the sections of their own names. What a stage can't see here it can't read,
so that `dvc.yaml` can be checked against signatures.
"""

import argparse
import ctypes
import inspect
import json
import os
import platform
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks import params as params_module
from tasks.params import UserError

# What a stage knows about the event beside its duration and memory, such as tokens per second.
EVENT: dict[str, Any] = {}

# Nothing phones home and nothing asks a hub unless a source in params.yaml names one.
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "warning",
}


def main(run: Callable[..., str], argv: list[str] | None = None) -> None:
    """Run a stage as a program; exit 1 with one line on the user's mistake, 130 and 143 on a signal."""
    name = Path(inspect.getfile(run)).stem
    signature = inspect.signature(run)
    doc = sys.modules[run.__module__].__doc__ or ""
    parser = argparse.ArgumentParser(
        prog=f"python -m tasks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    paths = [p.name for p in signature.parameters.values() if p.annotation is Path]
    texts = [p.name for p in signature.parameters.values() if p.annotation is str]
    sections = [p.name for p in signature.parameters.values() if p.annotation is not Path and p.annotation is not str]
    for option in paths:
        parser.add_argument(f"--{option.replace('_', '-')}", type=Path, required=True, metavar="PATH", dest=option)
    for option in texts:
        parser.add_argument(f"--{option.replace('_', '-')}", required=True, dest=option)
    shown = ", ".join(name if s == "params" else s for s in sections)
    parser.add_argument(
        "--params", type=Path, default=Path("params.yaml"), dest="_params", help=f"params file; read are: {shown}"
    )
    arguments = vars(parser.parse_args(argv))
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
    _die_with_parent()
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)  # transformers to trl and peft
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.time()
    try:
        every = params_module.load(arguments.pop("_params"))
        for option in paths:
            arguments[option].parent.mkdir(parents=True, exist_ok=True)
        chosen = {s: every[name if s == "params" else s] for s in sections}
        summary = run(**arguments, **chosen)
    except UserError as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno in (28, 30, 13):  # full, read-only, forbidden
            sys.exit(f"{name}: {error.strerror}: {error.filename or 'an output'}; free or unlock it and run again")
        raise
    seconds = time.time() - started
    _record(name, arguments, seconds, summary)
    print(f"{name}: {summary} ({seconds:.0f} s, peak {peak_bytes() / 2**30:.2f} GiB)", flush=True)


def peak_bytes() -> int:
    """Highest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _die_with_parent() -> None:
    """Ask Linux to end this stage when `dvc` dies, which forwards no signal (dvc 3.67.1: TERM or KILL orphans it)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _record(name: str, arguments: dict[str, Any], seconds: float, summary: str) -> None:
    """Facts about the event, beside the outputs and never within them: `data/<stage>/event.json`, not tracked."""
    folder = Path("data") / name
    if not folder.is_dir():
        return
    packages = {m: getattr(sys.modules.get(m), "__version__", None) for m in ("torch", "transformers", "trl", "peft")}
    event = {
        "stage": name,
        "arguments": {key: str(value) for key, value in arguments.items()},
        "seconds": round(seconds, 2),
        "peak_bytes": peak_bytes(),
        "summary": summary,
        **EVENT,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "packages": {key: value for key, value in packages.items() if value},
    }
    label = "".join(f".{value}" for value in arguments.values() if isinstance(value, str))
    (folder / f"event{label}.json").write_text(json.dumps(event, indent=2) + "\n")
