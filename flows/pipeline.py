"""dvc.yaml as a Prefect flow: one task run per stage, in graph order, each delegating to DVC.

    python -m flows.pipeline [STAGE …] [--pull] [--timeout SECONDS]

Nothing has to be started before: without a server's address Prefect starts its own, with SQLite, for as long as the flow
runs. A task run ends *Completed* when its stage ran, or *Cached*, with the reason as its message. DVC alone decides which;
Prefect caches nothing.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import httpx
from prefect import flow, get_client, get_run_logger, task
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import State
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectException
from prefect.futures import PrefectConcurrentFuture, PrefectFuture
from prefect.settings import PREFECT_API_URL, PREFECT_HOME
from prefect.states import Cancelled, Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.utilities.asyncutils import run_coro_as_sync
from pydantic import Field

from flows import mend, stages
from flows.stages import Outcome, Planned, Stopped
from tasks.params import UserError

LEASE = 60.0  # seconds, the least that Prefect takes, after which the slot of a flow that was killed is free again
UNREACHABLE = (httpx.HTTPError, PrefectException, RuntimeError)  # the last: "Failed to reach API"
POLL = 2.0  # seconds between two looks whether the run was cancelled
# a trainer's bar has no name: " 35%|███▌      | 42/120 [00:31<00:55,  1.40it/s]"
BAR = re.compile(r"^\s*(\d+)%\|.*\| (\d+)/(\d+) \[")


def _is_transient(_task: Any, _run: Any, state: State[Any]) -> bool:
    return state.name == "Transient"


@task(
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=2,
    retry_delay_seconds=[5, 30],
    retry_condition_fn=_is_transient,
)
def run_stage(
    planned: Planned,
    upstream: list[Any],
    root: Path,
    pull: bool,
    timeout: float | None,
    gpu: str,
    stop: threading.Event,
) -> State[Any]:
    """One stage through DVC, after `upstream`, the outcomes of those that it reads. Without any change DVC is not asked."""
    logger = get_run_logger()
    if not planned.changed and all(outcome.did == "unchanged" for outcome in upstream):
        outcome = Outcome("unchanged")
        return Completed(name="Cached", message=outcome.message, data=outcome)
    for reason in planned.reasons:
        logger.info("because: %s", reason)
    try:
        with _slot(gpu, stop, logger) if planned.gpu else contextlib.nullcontext():
            progress = Progress(planned.name)

            def log(line: str) -> None:
                logger.info("%s", line)
                progress.see(line)

            outcome = stages.execute(root, planned.name, log, timeout or planned.timeout, pull, stop)
            progress.done()
    except Stopped:
        return Cancelled(message="stopped with its flow; nothing that it started is left")
    except stages.StageTransient as error:
        return Failed(name="Transient", message=str(error))
    except stages.StageTimedOut as error:
        return Failed(name="TimedOut", message=f"{planned.name}: {error}")
    except UserError as error:
        return Failed(message=str(error))
    if outcome.did != "unchanged":
        _metrics_artifact(root, planned)
    if outcome.did == "ran":
        return Completed(message=outcome.message, data=outcome)
    return Completed(name="Cached", message=outcome.message, data=outcome)


@flow(name="pipeline", task_runner=ThreadPoolTaskRunner(), validate_parameters=True)  # type: ignore[arg-type]
def pipeline(
    repo: Path | None = None,
    targets: list[str] | None = None,
    pull: bool = False,
    timeout: Annotated[float, Field(gt=0)] | None = None,
    gpu: Annotated[str, Field(min_length=1)] = "gpu",
) -> Any:
    """Bring the stages of dvc.yaml up to date, as `dvc repro` would.

    Returns name → `Outcome` of every stage; ends *Failed* with the stage's own words, or *Cancelled*.

    Args:
        repo: folder of the DVC repository; empty: where the flow runs
        targets: stages to bring up to date, with all that they need; empty: every stage
        pull: fetch what is missing from the DVC remote instead of computing it
        timeout: seconds that one stage may take; empty: the stage's own `meta.timeout`, or no limit
        gpu: concurrency limit that GPU stages hold; give each machine its own
    """
    logger = get_run_logger()
    root = (repo or Path.cwd()).resolve()
    stop = threading.Event()
    futures: dict[str, PrefectFuture[Any]] = {}
    try:
        with stages.turn(root, logger.info, cancelled):
            planned = _plan(root, targets, logger)
            for each in planned:
                futures[each.name] = run_stage.with_options(name=each.name, task_run_name=each.name).submit(
                    each, [futures[name] for name in each.upstream], root, pull, timeout, gpu, stop
                )
            states = _wait(futures, stop)
    except Stopped:
        return Cancelled(message="cancelled while it waited; nothing was begun")
    except UserError as error:
        return Failed(message=str(error))
    finally:
        stop.set()  # also when this flow is terminated: every guard then ends what it started
    outcomes = {name: states[name].data for name in states}
    failed = [str(state.message) for state in states.values() if state.is_failed()]
    if any(state.is_cancelled() for state in states.values()) and not failed:
        return Cancelled(message="cancelled; what was running has been ended")
    if failed:
        skipped = [name for name, state in states.items() if state.name == "NotReady"]
        return Failed(message="; ".join(failed) + (f"; not run: {', '.join(skipped)}" if skipped else ""))
    results = {name: futures[name].result() for name in outcomes}
    _report_artifact(root, planned)
    counts = {said: sum(o.did == did for o in results.values()) for did, said in stages.SAID.items()}
    message = ", ".join(f"{count} {said}" for said, count in counts.items() if count) or "no stages"
    return Completed(message=message, data=results)


def _plan(root: Path, targets: list[str] | None, logger: Any) -> list[Planned]:
    """The graph; what a kill left cut off of DVC's own files is put right first, if it is that what stops DVC."""
    try:
        return stages.plan(root, targets)
    except UserError:
        mended = 0
        with contextlib.suppress(UserError):
            mended = mend.mend(root, logger.info, quick=True)
        if not mended:
            raise
    return stages.plan(root, targets)


def _wait(futures: dict[str, PrefectFuture[Any]], stop: threading.Event) -> dict[str, State[Any]]:
    """The last state of each. A run that somebody set to *Cancelling*, or whose parent, is stopped, though no runner watches
    over it.

    Until a future is done its state is the server's to say, which may be away for as long as a training goes on.
    """
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    with get_client(sync_client=True) as client:
        for name, future in futures.items():
            assert isinstance(future, PrefectConcurrentFuture)
            while True:
                future.wait(POLL)
                if future.wrapped_future.done():
                    if future.state.name == "NotReady":
                        _name(client, future.task_run_id, name)
                    break
                if not stop.is_set():
                    with contextlib.suppress(*UNREACHABLE):
                        if _is_cancelled(client, context.flow_run.id):
                            stop.set()
    return {name: future.state for name, future in futures.items()}


def cancelled() -> bool:
    """Whether somebody cancelled the flow that asks, or one that it is a part of. A server that is away says nothing."""
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        with contextlib.suppress(*UNREACHABLE), get_client(sync_client=True) as client:
            return _is_cancelled(client, context.flow_run.id)
    return False


def _is_cancelled(client: SyncPrefectClient, run: UUID) -> bool:
    """A `retrain` or `sweep` that was started by hand is cancelled on its own page, not on that of its pipeline."""
    seen = client.read_flow_run(run)
    if seen.state is not None and (seen.state.is_cancelling() or seen.state.is_cancelled()):
        return True
    if seen.parent_task_run_id is None:
        return False
    parent = client.read_task_run(seen.parent_task_run_id).flow_run_id
    return parent is not None and _is_cancelled(client, parent)


def _name(client: SyncPrefectClient, run: UUID, name: str) -> None:
    """Prefect 3.8.8 names a task run when it begins, and one that is NotReady never does.

    Its record is written from an event, name and all, so that the name has to come after that.
    """
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(*UNREACHABLE):
            state = client.read_task_run(run).state
            if state is not None and state.name == "NotReady":
                client.set_task_run_name(run, name)
                return
        time.sleep(0.1)


@contextlib.contextmanager
def _slot(name: str, stop: threading.Event, logger: Any) -> Iterator[None]:
    """One of the slots of the global concurrency limit `name`, which is made with one slot where it is missing, and with it
    a seat on this machine, which outlasts a server that is away.

    Raises:
        Stopped: `stop` was set while waiting.
    """
    said = ""

    def wait(why: str) -> None:
        nonlocal said
        if why != said:
            logger.info("%s", why)
            said = why
        if stop.is_set():
            raise Stopped from None

    while True:
        # strict: a limit that is missing would be skipped without a word. A lease that can't be renewed for a moment must
        # not end a training. The wait is cut in pieces, so that a cancelled flow does not wait for its turn.
        slot = concurrency(
            name, timeout_seconds=5, lease_duration=LEASE, strict=True, raise_on_lease_renewal_failure=False
        )
        try:
            with get_client(sync_client=True) as client:
                try:
                    seats = client.read_global_concurrency_limit_by_name(name).limit
                except ObjectNotFound:
                    seats = 1
                    with contextlib.suppress(ObjectAlreadyExists):
                        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
                slot.__enter__()
            break
        except TimeoutError:
            wait(f"waiting for a slot of the concurrency limit {name}")
            _free_expired()
        except (*UNREACHABLE, ConcurrencySlotAcquisitionError) as error:  # the last has what failed as its cause
            why = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
            wait(f"waiting for Prefect's server: {' '.join(why.split())[:200]}")
            stop.wait(5)
    seat: int | None = None
    try:
        while (seat := _seat(name, seats, logger)) is None:
            wait(f"waiting for a run on this machine that lost its slot of {name} while the server was away")
            stop.wait(1)
        yield
    finally:
        if seat is not None:
            os.close(seat)
        try:
            slot.__exit__(None, None, None)
        except UNREACHABLE as error:  # what the stage made is there all the same; the slot is free when its lease ends
            logger.warning("the slot of %s could not be given back: %s", name, " ".join(str(error).split())[:200])


def _seat(name: str, seats: int, logger: Any) -> int | None:
    """An open folder whose lock is one of this machine's `seats` beside the server's slots; None: all are taken.

    A slot is lost for good when the server was away for longer than `LEASE` (prefect 3.8.8 tries three times to renew it), and
    the next flow would get it while the training goes on. The kernel frees a seat with its process, however that ends.
    """
    server = PREFECT_API_URL.value() or PREFECT_HOME.value()
    key = hashlib.sha256(f"{server} {name}".encode()).hexdigest()[:16]
    try:
        for number in range(seats):
            # a folder: systemd takes files out of /tmp that were not written for days, but no folder that is locked
            path = Path(tempfile.gettempdir()) / f"reforge-{key}-{number}"
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                path.chmod(0o755)  # other users of the server lock the same one
            seat = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(seat, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return seat
            except BlockingIOError:
                os.close(seat)
    except OSError as error:  # no training ends for this
        logger.warning("only the server's slot of %s is held, none of this machine: %s", name, error)
        return os.open(os.devnull, os.O_RDONLY)
    return None


def _free_expired() -> None:
    """Give back the slots of flows that are gone: the server that Prefect starts for one flow alone does not look for them.

    Leases of a server elsewhere are not here; it looks for them itself.
    """
    from prefect.server.concurrency.lease_storage.filesystem import ConcurrencyLeaseStorage

    storage = ConcurrencyLeaseStorage()
    with contextlib.suppress(*UNREACHABLE), get_client(sync_client=True) as client:
        expired: Any = run_coro_as_sync(storage.read_expired_lease_ids())
        for lease in expired:
            client.release_concurrency_slots_with_lease(lease)


class Progress:
    """A training's bar as a progress artifact: the first bar without a name in the log of a stage."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.total: str | None = None
        self.loss = ""
        self.artifact: Any = None

    def see(self, line: str) -> None:
        if loss := re.search(r"'loss': '?([-\d.e]+)", line):
            self.loss = f", loss {loss[1]}"
        bar = BAR.match(line)
        if not bar or (self.total and bar[3] != self.total):
            return
        self.total = bar[3]
        self._show(float(bar[1]), f"{self.stage}: step {bar[2]} of {bar[3]}{self.loss}")

    def done(self) -> None:
        if self.artifact is not None:
            self._show(100.0, f"{self.stage}: done{self.loss}")

    def _show(self, percent: float, said: str) -> None:
        with contextlib.suppress(*UNREACHABLE):  # a server that restarts must not end a training of hours
            if self.artifact is None:
                self.artifact = create_progress_artifact(percent, key=f"{_key(self.stage)}-progress", description=said)
            else:
                update_progress_artifact(self.artifact, percent, description=said)


def _key(stage: str) -> str:
    """Artifact keys take lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", stage.lower()).strip("-")


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _metrics_artifact(root: Path, planned: Planned) -> None:
    rows = [
        {
            "metric": metric.name,
            "value": _number(metric.value),
            "HEAD": "" if metric.head is None else _number(metric.head),
            "change": "" if metric.change is None else f"{metric.change:+.6g}",
        }
        for metric in stages.metrics(root, planned.metrics)
        if not isinstance(metric.value, list)
    ]
    if rows:
        with contextlib.suppress(*UNREACHABLE):  # what the stage made is there all the same
            create_table_artifact(
                rows,
                key=f"{_key(planned.name)}-metrics",
                description=f"Metrics of {planned.name} and their change since HEAD",
            )


def _report_artifact(root: Path, planned: Sequence[Planned]) -> None:
    for path in (
        out for each in planned if each.name == "report" for out in each.outputs if Path(out).name == "report.md"
    ):
        with contextlib.suppress(*UNREACHABLE):
            create_markdown_artifact(
                (root / path).read_text(encoding="utf-8"), key="report", description="The report of this run"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """The flow from a command line; 0 if all stages are up to date."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="STAGE", help="stages to bring up to date; default: all")
    parser.add_argument("--pull", action="store_true", help="fetch what is missing from the DVC remote")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="how long one stage may take")
    parser.add_argument("--gpu", default="gpu", metavar="NAME", help="concurrency limit that GPU stages hold")
    given = parser.parse_args(arguments)
    if given.timeout is not None and given.timeout <= 0:
        parser.error(f"--timeout: expected seconds above 0, found {given.timeout:g}")
    return finish(
        "pipeline",
        lambda: pipeline(
            targets=given.targets or None, pull=given.pull, timeout=given.timeout, gpu=given.gpu, return_state=True
        ),
    )


def finish(name: str, run: Callable[[], Any]) -> int:
    """Run a flow for a command line: its state's message as the last line, and an exit code; no traceback of Prefect's."""
    try:
        state = run()
    except KeyboardInterrupt:
        return 130
    except UNREACHABLE as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1
    print(f"{name}: {state.message}", file=sys.stdout if state.is_completed() else sys.stderr, flush=True)
    return 0 if state.is_completed() else 1


if __name__ == "__main__":
    sys.exit(main())
