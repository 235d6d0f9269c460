"""The pipeline for every combination of some parameters, and a table that compares them.

    python -m flows.sweep dpo.beta=0.1,0.3 dpo.learning_rate=1e-4,3e-4

Each point is a run of the flow `pipeline` in a git worktree of HEAD with the DVC cache and run cache of this repository.
So the workspace stays as it is, points share every stage that they have in common, and a chosen point costs nothing more:
write its values into params.yaml and `dvc repro` restores it. An interrupted point goes on in its worktree next time.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.states import Cancelled, Completed, Failed
from pydantic import BaseModel, ConfigDict, Field, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows import stages, worktrees
from flows.pipeline import UNREACHABLE, cancelled, finish, pipeline
from tasks import params
from tasks.params import UserError

Value = bool | int | float | str


class SweepParameters(BaseModel):
    """What to vary and what to look at."""

    model_config = ConfigDict(extra="forbid")

    values: dict[str, list[Value]] = Field(
        default={"dpo.beta": [0.1, 0.3]}, min_length=1, description="SECTION.KEY of params.yaml → the values to try"
    )
    targets: list[str] = Field(
        default=["evaluate@dpo"], min_length=1, description="stages that each point runs, with all that they need"
    )
    metrics: list[stages.Figure] = Field(
        default=[
            "data/evaluate/dpo.json:answers.trained.recall",
            "data/evaluate/dpo.json:answers.unseen.recall",
            "data/evaluate/dpo.json:manner.kindness",
            "data/evaluate/dpo.json:honesty.invented_declined",
            "data/evaluate/dpo.json:honesty.trained_declined",
            "data/evaluate/dpo.json:general.accuracy",
        ],
        min_length=1,
        description="columns of the table, FILE:KEY, empty where a test has no such figure; the first one sorts it",
    )
    best: Literal["highest", "lowest"] = Field(
        default="highest", description="which end of the first metric comes first"
    )
    pull: bool = Field(default=False, description="fetch what is missing from the DVC remote instead of computing it")
    max_points: int = Field(default=16, ge=1, le=256, description="refuse a sweep of more points than this")

    @field_validator("values")
    @classmethod
    def _not_empty(cls, values: dict[str, list[Value]]) -> dict[str, list[Value]]:
        for key, tried in values.items():
            if "." not in key and key != "seed":
                raise ValueError(f"{key}: expected SECTION.KEY, such as dpo.beta")
            if not tried:
                raise ValueError(f"{key}: expected at least one value")
        return values


@flow(name="sweep")
def sweep(parameters: SweepParameters = SweepParameters()) -> Any:  # noqa: B008  (a frozen default that the UI shows)
    """Run the pipeline for every combination of values and compare the results.

    Every point is checked against params.yaml before the first one runs. A point that fails, or is cancelled, does not stop the
    others; the latter has no row.
    """
    logger = get_run_logger()
    repo = Path.cwd()
    try:
        points = expand(repo, parameters)
        if edited := worktrees.edited(repo):
            logger.warning("points run HEAD, not your edits to %s", edited)
    except UserError as error:
        return Failed(message=str(error))
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    # points have folders of their own, which two sweeps may share; one that is cancelled while it waits has no point
    with contextlib.suppress(stages.Stopped), stages.turn(repo, logger.info, cancelled, "sweep"):
        for number, point in enumerate(points, 1):
            if cancelled():
                break
            label = ", ".join(f"{key}={value}" for key, value in point.items())
            logger.info("point %d of %d: %s", number, len(points), label)
            try:
                with worktrees.worktree(repo, _folder(repo, point), point) as folder:
                    run = pipeline.with_options(flow_run_name=label)
                    state: Any = run(repo=folder, targets=parameters.targets, pull=parameters.pull, return_state=True)
                    if state.is_cancelled():
                        raise stages.Stopped
                    if not state.is_completed():
                        raise UserError(str(state.message))
                    row: dict[str, Any] = dict(point) | figures(folder, parameters.metrics)
            except stages.Stopped:  # out of the worktree, which stays for the next time
                logger.info("%s: cancelled", label)
                continue
            except UserError as error:
                logger.error("%s: %s", label, error)
                failed.append(label)
                row = dict(point) | {"failed": str(error)}
            rows.append(row)
    columns = _columns(parameters.metrics)
    first = next((name for name in columns if any(row.get(name) is not None for row in rows)), columns[0])
    sign = -1 if parameters.best == "highest" else 1
    rows.sort(key=lambda row: sign * row[first] if isinstance(row.get(first), (int, float)) else math.inf)
    for row in rows:  # here, so that they are seen however it ends
        logger.info("%s", "  ".join(f"{key}={value}" for key, value in row.items()))
    with contextlib.suppress(*UNREACHABLE):  # the points are there all the same
        create_table_artifact(rows, key="sweep", description=f"{len(rows)} points, {parameters.best} {first} first")
    faults = f"{len(failed)} of {len(points)} points failed: {'; '.join(failed)}" if failed else ""
    if len(rows) < len(points):
        said = f"cancelled after {len(rows)} of {len(points)} points; what was begun goes on next time"
        return Cancelled(message=f"{said}; {faults}" if faults else said)
    if failed:
        return Failed(message=faults)
    return Completed(message=f"{len(points)} points, {parameters.best} {first} first", data=rows)


def expand(repo: Path, parameters: SweepParameters) -> list[dict[str, Value]]:
    """Every combination, each of which makes a valid params.yaml.

    Raises:
        UserError: naming the key and value that do not, or that there are too many points, or a figure that no stage on
            the way to the targets makes.
    """
    count = math.prod(len(values) for values in parameters.values.values())
    if count > parameters.max_points:
        raise UserError(f"{count} points are more than max_points, {parameters.max_points}")
    points = [
        dict(zip(parameters.values, values, strict=True)) for values in itertools.product(*parameters.values.values())
    ]
    made = [path for each in stages.plan(repo, parameters.targets) for path in each.metrics]
    for path in (metric.rpartition(":")[0] for metric in parameters.metrics):
        if path not in made:
            raise UserError(
                f"metrics: {path} is no metrics file of these targets; there are {', '.join(made) or 'none'}"
            )
    for point in points:
        raw = worktrees.settings(repo)
        worktrees.change(raw, point)
        params.check(raw)
    return points


def _folder(repo: Path, point: Mapping[str, Value]) -> Path:
    key = hashlib.sha256(json.dumps(dict(point), sort_keys=True).encode()).hexdigest()[:16]
    return repo / ".dvc" / "tmp" / "sweep" / key


def _columns(metrics: Sequence[str]) -> list[str]:
    """The key of each `FILE:KEY`, and the file too where two have one key."""
    keys = [metric.rpartition(":")[2] for metric in metrics]
    return [key if keys.count(key) == 1 else metric for key, metric in zip(keys, metrics, strict=True)]


def figures(folder: Path, wanted: Sequence[str]) -> dict[str, Any]:
    """Column → figure of `FILE:KEY`, None where there is none; a figure with an interval, `KEY.value`, stands for itself.

    Raises:
        UserError: there is none of them all.
    """
    out: dict[str, Any] = {}
    for column, metric in zip(_columns(wanted), wanted, strict=True):
        path, _, key = metric.rpartition(":")
        known = {found.name: found.value for found in stages.metrics(folder, [path])} if path else {}
        out[column] = known.get(key, known.get(f"{key}.value"))
    if not any(value is not None for value in out.values()):
        raise UserError(
            f"metrics: {', '.join(wanted)}: no such figure; expected FILE:KEY, such as data/dpo/metrics.json:steps"
        )
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """The flow from a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("values", nargs="+", metavar="SECTION.KEY=VALUE,…", help="what to vary")
    parser.add_argument(
        "--metric", action="append", metavar="FILE:KEY", help="columns of the table; the first one sorts it"
    )
    parser.add_argument(
        "--target", action="append", metavar="STAGE", help="what each point runs (default: evaluate@dpo)"
    )
    fields = SweepParameters.model_fields
    parser.add_argument(
        "--best", choices=("highest", "lowest"), help=f"{fields['best'].description} (default: highest)"
    )
    parser.add_argument("--pull", action="store_true", default=None, help=fields["pull"].description)
    parser.add_argument("--max-points", type=int, metavar="N", help=f"{fields['max_points'].description} (default: 16)")
    given = parser.parse_args(arguments)
    values: dict[str, list[Value]] = {}
    for pair in given.values:
        key, equals, text = pair.partition("=")
        if not equals:
            parser.error(f"{pair}: expected SECTION.KEY=VALUE,…")
        try:
            values[key] = [YAML(typ="safe", pure=True).load(value) for value in text.split(",")]
        except (YAMLError, ValueError, KeyError):  # ruamel's own faults too, as `params.read` has them
            parser.error(f"{pair}: expected plain values between commas; lists can be arms of experiments.yaml")
    chosen = {
        "metrics": given.metric,
        "targets": given.target,
        "best": given.best,
        "pull": given.pull,
        "max_points": given.max_points,
    }
    more = {name: value for name, value in chosen.items() if value is not None}
    try:
        parameters = SweepParameters.model_validate({"values": values, **more})
    except ValueError as error:
        print(f"sweep: {' '.join(str(error).split())}", file=sys.stderr)
        return 1

    return finish("sweep", lambda: sweep(parameters, return_state=True))


if __name__ == "__main__":
    sys.exit(main())
