"""How a stage starts and ends: its command line, its params, its errors, its summary.

A stage module ends in `if __name__ == "__main__": stage.main(run)`. The signature of `run` is the command line: every
`Path` is a required option of the same name, every other parameter is read from `params.yaml`: `params` is the section
named after the stage, `seed` and the rest the sections of their own names. What a stage can't see here it can't read,
so that `dvc.yaml` can be checked against signatures.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import yaml

from tasks import die_with_parent
from tasks import params as params_module
from tasks.params import UserError

# What a stage knows about the event beside its duration and memory, such as tokens per second.
EVENT: dict[str, Any] = {}

# Libraries whose version can change a byte of an output.
LIBRARIES = (
    "accelerate", "bitsandbytes", "datasets", "numpy", "peft", "polars", "safetensors", "tokenizers", "torch",
    "transformers", "trl",
)  # fmt: skip
GRACE = 10.0  # seconds between SIGTERM and SIGKILL for a stage that was left behind


def main(run: Callable[..., str], argv: list[str] | None = None) -> None:
    """Run a stage as a program; exit 1 with one line on the user's mistake, 130 and 143 on a signal.

    Started by DVC, it first ends what a killed `dvc` left running of the same stage, and refuses damaged inputs.
    """
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
    die_with_parent()
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)  # transformers to trl and peft
    # at once: Python swallows an exception that is raised within a destructor, and the stage would run on
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see tasks/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.time()
    try:
        under_dvc = os.environ.get("DVC_STAGE")
        alone = _alone(under_dvc) if under_dvc else None
        every = params_module.load(arguments.pop("_params"))
        if under_dvc:
            check_inputs(under_dvc, [arguments[option] for option in paths])
        for option in paths:
            arguments[option].parent.mkdir(parents=True, exist_ok=True)
        chosen = {s: every[name if s == "params" else s] for s in sections}
        summary = run(**arguments, **chosen)
    except UserError as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        known = _machine(error, [arguments[option] for option in paths])
        if known is None:
            raise
        sys.exit(f"{name}: {known}")
    seconds = time.time() - started
    with contextlib.suppress(OSError):  # a full disk now is DVC's to say
        _record(name, arguments, seconds, summary)
    if alone is not None:
        alone.close()
    print(f"{name}: {summary} ({seconds:.0f} s, peak {peak_bytes() / 2**30:.2f} GiB)", flush=True)


def peak_bytes() -> int:
    """Highest resident memory of this process so far, in bytes."""
    with contextlib.suppress(OSError, StopIteration):  # ru_maxrss begins with what the parent had before the exec
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in status if line.startswith("VmHWM:")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _machine(error: Exception, paths: list[Path]) -> str | None:
    """One line on a failure that is the machine's: no memory, a full, read-only or forbidden disk. None: it is ours."""
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "out of memory; the README's table says what to lower, in which order"
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{error.strerror}: {error.filename or 'an output'}; free or unlock it and run again"
    number = getattr(error, "errno", None)
    words = re.search(r"No space left|os error 28|Disk quota|File too large|os error 27", str(error))
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or words:
        return f"the disk is full: {' '.join(str(error).split())[:200]}; free some space and run again"
    folders = {parent for path in paths for parent in path.absolute().parents if parent.is_dir()}
    for folder in sorted(folders, key=lambda p: -len(p.parts)):  # torch.save says "unexpected pos" and no more
        if shutil.disk_usage(folder).free < 2**20:
            return f"the disk is full: less than 1 MiB is free in {folder}; free some space and run again"
    return None


def _alone(stage: str) -> IO[str]:
    """Hold this stage's lock as long as the file returned is open, and end whoever has it.

    DVC starts no stage that a living `dvc` runs, so that the holder was left behind by one that was killed: before it had
    asked to die with it, or behind a shell that lives on. Two of them would write the same files at the same time.
    """
    path = Path(os.environ["DVC_ROOT"], ".dvc", "tmp", f"stage-{stage.replace('/', '_')}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = path.open("a+")
    for number in (signal.SIGTERM, signal.SIGKILL):
        if _locked(handle, 0):
            break
        handle.seek(0)
        pid = handle.read()
        if _runs(pid, stage):
            print(f"note: ending process {pid}, which a killed dvc left running here", flush=True)
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), number)
        if _locked(handle, GRACE):
            break
    else:
        raise UserError(f"{path}: process {pid} holds it and does not end; end it and run again")
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


def _locked(handle: IO[str], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)


def _runs(pid: str, stage: str) -> bool:
    """Whether this process is that stage, and not a later one of the same number."""
    try:
        return f"DVC_STAGE={stage}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def check_inputs(stage: str, paths: list[Path]) -> None:
    """Refuse inputs whose bytes are not those that their stage made, as `dvc.lock` recorded them.

    DVC trusts its cache: a damaged file is copied from it and taken for the right one (docs/decisions/0008-damage.md).

    Raises:
        UserError: naming the input, the stage that made it, and what to do.
    """
    lock = Path("dvc.lock")
    if not lock.is_file():
        return
    recorded = (yaml.load(lock.read_text(), yaml.CSafeLoader) or {}).get("stages") or {}
    names = [path.as_posix() for path in paths]
    # path → maker → MD5; of a renamed stage the old entry stays in dvc.lock for ever
    made: dict[str, dict[str, str]] = {}
    for maker, entry in recorded.items():
        for out in entry.get("outs", ()) if maker != stage else ():
            path = out["path"]
            if any(f"{a}/".startswith(f"{b}/") for name in names for a, b in ((path, name), (name, path))):
                made.setdefault(path, {})[maker] = out["md5"]
    for path, known in made.items():
        if Path(path).exists() and (found := hash_of(Path(path))) not in known.values():
            maker, wanted = list(known.items())[-1]
            there = yaml.load(Path("dvc.yaml").read_text(), yaml.CSafeLoader) if Path("dvc.yaml").is_file() else None
            gone = [name for name in known if there and name.partition("@")[0] not in (there.get("stages") or {})]
            stale = f"; dvc.lock still has `{gone[0]}`, which dvc.yaml has not: remove its entry" if gone else ""
            raise UserError(
                f"{path} is not what `{maker}` made: dvc.lock says {wanted}, found {found}{stale}; if you did not change it, it is damaged: `python -m flows.mend` names the file and mends it"
            )


def hash_of(path: Path) -> str:
    """MD5 of a file or a folder as DVC computes it, always from the bytes."""

    def of(file: Path) -> str:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()

    if path.is_file():
        return of(path)
    files = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
    listing = json.dumps([{"md5": of(file), "relpath": name} for name, file in files], sort_keys=True)
    return f"{hashlib.md5(listing.encode(), usedforsecurity=False).hexdigest()}.dir"


def _record(name: str, arguments: dict[str, Any], seconds: float, summary: str) -> None:
    """Facts about the event, beside the outputs and never within them: `data/<stage>/event.json`, not tracked.

    An instance of a `foreach` has one of its own: `event.base.json`.
    """
    folder = Path("data") / name
    if not folder.is_dir():
        return
    torch = sys.modules.get("torch")
    event = {
        "stage": name,
        "arguments": {key: str(value) for key, value in arguments.items()},
        "seconds": round(seconds, 2),
        "peak_bytes": peak_bytes(),
        "summary": summary,
        **EVENT,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "instruction_set": torch.backends.cpu.get_cpu_capability() if torch else None,
        "threads": torch.get_num_threads() if torch else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else [],
        "packages": {library: importlib.metadata.version(library) for library in LIBRARIES if library in sys.modules},
    }
    instance = os.environ.get("DVC_STAGE", "").partition("@")[2]
    label = "".join(f".{value}" for value in (instance, *arguments.values()) if value and isinstance(value, str))
    (folder / f"event{label}.json").write_text(json.dumps(event, indent=2) + "\n")


def _cpu() -> str:
    """Its name, where the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
