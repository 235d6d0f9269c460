"""share: set up the DVC remote through which a team exchanges what its runs made, and check that it works.

    python -m flows.share s3://bucket/reforge --endpointurl https://s3.example.org
    python -m flows.share ssh://host/srv/reforge --keyfile ~/.ssh/team
    python -m flows.share /mnt/team/reforge
    python -m flows.share                   join: .dvc/config names the remote already, the credentials are yours

What is the same for everybody goes to `.dvc/config`, which git tracks: the address of an S3 or SSH remote, its endpoint, its
region. What is one person's or one machine's goes to `.dvc/config.local`, which git ignores: keys, profile, user, key file,
and a directory. S3 keys come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or are asked for; they are on no command
line. Nothing is written before DVC itself has sent a small file to the remote and got it back.
"""

import argparse
import getpass
import os
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from configobj import ConfigObj, ConfigObjError  # type: ignore[import-untyped]  # of dvc, whose files these are

from tasks.params import UserError

TEAM, FOLDER = "team", "folder"  # names of the remotes: one for everybody, one of this machine
SECONDS = 60.0  # for a file of a few bytes to go up, and again to come back
# option → (for which remotes, what it takes, help); those of SHARED are the same for everybody
OPTIONS = {
    "endpointurl": ("s3", "URL", "address of an S3 server other than Amazon's"),
    "region": ("s3", "NAME", "region of the bucket"),
    "profile": ("s3", "NAME", "profile of ~/.aws to use instead of keys"),
    "keyfile": ("ssh", "FILE", "private key to log in with; default: those that ssh would try"),
    "user": ("ssh", "NAME", "user to log in as"),
}
SHARED = ("endpointurl", "region")
KEYS = {"access_key_id": "AWS_ACCESS_KEY_ID", "secret_access_key": "AWS_SECRET_ACCESS_KEY"}
# What DVC says → what it means. The words are those of s3fs, botocore, asyncssh and the system under dvc 3.67.1.
MEANINGS = (
    (r"NoSuchBucket|bucket does not exist", "the bucket does not exist"),
    (r"Unable to locate credentials", "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give a profile"),
    (r"Forbidden|\(40[13]\)|InvalidAccessKeyId|SignatureDoesNotMatch|Access ?Denied|ExpiredToken", "access denied: a wrong key, or one without the right to read and write there"),
    (r"Permission denied for user", "login refused: a wrong user, or a key that the host does not know"),
    (r"profile .* could not be found", "no such profile in ~/.aws"),
    (r"Could not connect to the endpoint|Connect call failed|Errno 11[013]\b|Errno -\d|Name or service not known|onnection refused|unreachable", "no server answers there: a wrong host or port, or no network"),
    (r"Permission denied|Read-only file system|Errno 13\b|Errno 30\b", "no right to write there"),
    (r"No such file|Not a directory|File exists", "no such folder, and it can't be made"),
)  # fmt: skip


def share(
    repo: Path, remote: str | None, options: Mapping[str, str], environment: Mapping[str, str] = os.environ
) -> tuple[str, list[str]]:
    """Make `remote` the default DVC remote of `repo`, once a file has gone there and come back.

    Args:
        remote: `s3://BUCKET/PATH`, `ssh://[USER@]HOST[:PORT]/PATH` or a directory; None: the one that is configured.
        options: those of `OPTIONS` that were given.

    Returns:
        The remote's address, and the files that changed.

    Raises:
        UserError: the address or an option makes no sense, or the remote does not work. Nothing has changed then.
    """
    folder = repo / ".dvc"
    if not folder.is_dir():
        raise UserError(f"{repo}: no DVC repository: run this in a clone of the project")
    files = {name: _read(folder / name) for name in ("config", "config.local")}
    tracked, own = files.values()
    before = {name: config.dict() for name, config in files.items()}
    if remote is None:
        name = _core(own) or _core(tracked)
        section = f'remote "{name}"'
        url = own.get(section, {}).get("url") or tracked.get(section, {}).get("url")
        if not url:
            raise UserError("no remote is configured: expected REMOTE=s3://BUCKET/PATH, ssh://HOST/PATH or a directory")
        scheme, place = address(url, folder)  # DVC writes a directory relative to .dvc
    else:
        scheme, place = address(remote, Path.cwd())
        section = f'remote "{FOLDER if scheme == "local" else TEAM}"'
        home = own if scheme == "local" else tracked
        if home.get(section, {}).get("url") != place:
            tracked.pop(section, None)  # what belonged to another place
            own.pop(section, None)
        home.setdefault(section, {})["url"] = place
        if scheme == "local":
            home.setdefault("core", {})["remote"] = FOLDER
        else:
            tracked.setdefault("core", {})["remote"] = TEAM
            own.get("core", {}).pop("remote", None)
    if scheme == "local" and Path(place).is_relative_to(repo.resolve()):
        raise UserError(f"{place}: expected a directory outside of the repository")
    if scheme == "local" and "shared" not in {**tracked.get(section, {}), **own.get(section, {})}:
        own.setdefault(section, {})["shared"] = "group"  # or the folders that one person makes are closed to the others
    for key, value in _checked(options, scheme).items():
        (tracked if key in SHARED else own).setdefault(section, {})[key] = value
    if scheme == "s3":
        _credentials(own.setdefault(section, {}), environment)
    for config in files.values():
        for empty in [key for key in config if not config[key]]:
            del config[empty]
    command = ["git", "check-ignore", "--quiet", str(folder / "config.local")]
    ignored = subprocess.run(command, cwd=repo, capture_output=True)  # noqa: S603
    if ignored.returncode == 1:
        raise UserError(
            ".dvc/config.local is not ignored by git, and would hold credentials: add it to .dvc/.gitignore"
        )
    try_out({**tracked.get(section, {}), **own.get(section, {}), "url": place}, scheme)
    changed = [name for name, config in files.items() if config.dict() != before[name]]
    for name in changed:
        _write(files[name], folder / name)
    return place, [f".dvc/{name}" for name in changed]


def address(remote: str, start: Path) -> tuple[str, str]:
    """(s3, ssh or local, the address as DVC takes it); a directory is resolved from `start`.

    Raises:
        UserError: no address that a run cache can be shared through.
    """
    scheme, colon, _ = remote.partition("://")
    if not colon:
        return "local", str((start / Path(remote).expanduser()).resolve())
    try:
        parts = urlsplit(remote)
        password, host = parts.password, parts.hostname
        _ = parts.port
    except ValueError as error:
        raise UserError(f"{remote}: {error}") from None
    if password is not None:
        shown = remote.replace(f":{password}@", "@")
        raise UserError(f"{shown}: a password in an address would get into git: log in with a key (--keyfile)")
    if scheme not in ("s3", "ssh"):
        why = ": an HTTP remote can't be pushed to and has no run cache" if scheme.startswith("http") else ""
        raise UserError(f"{remote}: expected s3://BUCKET/PATH, ssh://HOST/PATH or a directory{why}")
    if not host or (scheme == "ssh" and not parts.path.strip("/")):
        raise UserError(f"{remote}: expected {'s3://BUCKET/PATH' if scheme == 's3' else 'ssh://HOST/PATH'}")
    return scheme, remote.rstrip("/")


def _checked(options: Mapping[str, str], scheme: str) -> dict[str, str]:
    found = dict(options)
    for key in found:
        if OPTIONS[key][0] != scheme:
            raise UserError(f"--{key}: is for {OPTIONS[key][0]}:// remotes, found a {scheme} one")
    if "keyfile" in found:
        path = Path(found["keyfile"]).expanduser().resolve()
        if not path.is_file():
            raise UserError(f"--keyfile: no such file: {path}")
        found["keyfile"] = str(path)
    return found


def _credentials(own: dict[str, str], environment: Mapping[str, str]) -> None:
    """Put the S3 keys into `own`: those of the environment, those that are there, or what a person types.

    A profile is instead of keys. Temporary keys (with AWS_SESSION_TOKEN) stay in the environment: in a file they would
    soon stand in the way of newer ones.
    """
    found = [environment.get(variable, "") for variable in KEYS.values()]
    if "profile" in own or environment.get("AWS_SESSION_TOKEN"):
        for key in KEYS:
            own.pop(key, None)
    elif all(found):
        own.update(dict(zip(KEYS, found, strict=True)))
    elif any(found):
        raise UserError(f"{' and '.join(KEYS.values())}: expected both, found one")
    elif not all(key in own for key in KEYS) and sys.stdin.isatty():
        identity = input("Access key id (empty: ~/.aws or the machine's role): ").strip()
        if identity:
            secret = getpass.getpass("Secret access key (not shown): ")
            own.update({"access_key_id": identity, "secret_access_key": secret})


def try_out(remote: Mapping[str, str], scheme: str) -> None:
    """Send a file of 32 bytes to `remote` and get it back, by DVC, in a repository made for it; the file stays there.

    Raises:
        UserError: it did not work; the message says what is wrong with what.
    """
    # the libraries' own limits for a host that does not answer are minutes
    limits = {"s3": {"connect_timeout": "10"}, "ssh": {"timeout": "30"}}.get(scheme, {})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = os.environ | {"DVC_SITE_CACHE_DIR": str(folder / "site"), "DVC_NO_ANALYTICS": "1"}
        probe = folder / "probe"

        def dvc(*arguments: str) -> None:
            command = [sys.executable, "-m", "dvc", *arguments]
            try:
                done = subprocess.run(  # noqa: S603
                    command,
                    cwd=folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    timeout=SECONDS,
                )
            except subprocess.TimeoutExpired:
                raise UserError(f"{_where(remote)}: no answer within {SECONDS:g} seconds") from None
            if done.returncode:
                raise UserError(f"{_where(remote)}: {explain(done.stderr)}")

        dvc("init", "--quiet", "--no-scm")
        config = ConfigObj(
            {"core": {"remote": TEAM, "check_update": "false"}, f'remote "{TEAM}"': {**limits, **remote}}
        )
        _write(config, folder / ".dvc/config.local")
        probe.write_text(text := uuid.uuid4().hex)
        dvc("add", "probe")
        dvc("push")
        probe.unlink()
        shutil.rmtree(folder / ".dvc/cache")
        dvc("pull")
        if probe.read_text() != text:
            raise UserError(f"{_where(remote)}: a file came back different from what was sent")


def closed(place: str) -> str:
    """The umask of this process if what it makes in the directory `place` is closed to the group, for whom that is open; else "".

    DVC's `shared = group` opens the folders of files; what a push makes of the run cache has the umask (dvc 3.67.1).
    """
    mask = os.umask(0o077)
    os.umask(mask)
    return f"{mask:03o}" if mask & 0o020 and Path(place).is_dir() and Path(place).stat().st_mode & 0o020 else ""


def explain(output: str) -> str:
    """DVC's first error in plain words, with its own behind; its own alone if they are none that are known."""
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    words = re.sub(r"^(unexpected error|failed to transfer '\w+') - ", "", errors[0] if errors else output.strip())
    words = " ".join(words.split())[:300] or "dvc failed without a word"
    for pattern, meaning in MEANINGS:
        if re.search(pattern, words):
            return f"{meaning} (dvc: {words})"
    return words


def _where(remote: Mapping[str, str]) -> str:
    return remote["url"] + (f" at {remote['endpointurl']}" if "endpointurl" in remote else "")


def _core(config: Any) -> str:
    return str(config.get("core", {}).get("remote", ""))


def _read(path: Path) -> Any:
    try:
        return ConfigObj(str(path), encoding="utf-8", interpolation=False)
    except ConfigObjError as error:
        raise UserError(f"{path}: {error}") from None


def _write(config: Any, path: Path) -> None:
    """In one step; what may hold credentials is readable by its owner alone."""
    config.encoding = "utf-8"
    other = path.with_name(f"{path.name}.{os.getpid()}")
    mode = 0o600 if path.name == "config.local" else 0o644
    with os.fdopen(os.open(other, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        config.write(file)
    other.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if the remote works and is set up."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.share", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("remote", nargs="?", help="s3://BUCKET/PATH, ssh://HOST/PATH or a directory")
    for name, (scheme, value, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", metavar=value, help=f"{scheme}: {text}")
    given = vars(parser.parse_args(arguments))
    remote = given.pop("remote")
    try:
        place, changed = share(Path.cwd(), remote, {key: value for key, value in given.items() if value})
    except UserError as error:
        print(f"share: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, EOFError):
        return 130
    print(f"share: {place} works: DVC has sent a file there and got it back")
    if ".dvc/config" in changed:
        print("share: .dvc/config has the address, the same for everybody: git commit .dvc/config")
    if ".dvc/config.local" in changed:
        print("share: .dvc/config.local has what is yours; git ignores it")
    if mask := closed(place):
        print(
            f"share: note: your umask {mask} closes to the others what you push there: put `umask 002` into ~/.profile,"
        )
        print("share:       and into services and cron jobs (UMask=0002)")
    print("after a run:          git add -A && git commit && dvc push --run-cache && git push --follow-tags")
    print("to get the others':   git pull && dvc pull --run-cache")
    return 0


if __name__ == "__main__":
    sys.exit(main())
