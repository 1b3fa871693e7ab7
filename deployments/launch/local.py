"""`make serve`: a local Ray and the application of a YAML file, in the foreground, until Ctrl-C or SIGTERM.

    python -m deployments.launch.local deployments/tiny.yaml

It is `serve run --address local` behind checks: of the file, of its port, and of another one in this checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from deployments.args import AppArgs
from deployments.launch.ports import PortError, check_free
from deployments.launch.processes import supervise

_SERVE_RUN = [sys.executable, "-c", "from ray.serve.scripts import cli; cli(prog_name='serve')", "run"]
_KEEPER = [sys.executable, "-m", "deployments.launch.processes"]
"""Between this process and `serve run`: where this one is killed, it ends what Ray's processes leave behind."""
_BUILDER = "deployments.app:build"


class StartError(RuntimeError):
    """Why nothing was started."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 where nothing was started, 128 + the signal that ended it."""
    parser = argparse.ArgumentParser(prog="python -m deployments.launch.local", description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path, help="a YAML file of Serve")
    parser.add_argument("--locks", type=Path, default=Path(".build/ray"), help="folder (default: %(default)s)")
    parser.add_argument("--with-parent", action="store_true", help="end when the process that started this one ends")
    arguments = parser.parse_args(argv)
    try:
        options = read(arguments.config).http_options
        with only_one(arguments.locks, options.port):
            check_free(options.host, options.port)
            command = [*_KEEPER, *_SERVE_RUN, "--address", "local", str(arguments.config)]
            return supervise(command, ends_with_parent=arguments.with_parent)
    except (StartError, PortError, OSError) as error:
        print(f"{arguments.config}: {error}", file=sys.stderr)
        return 2


def read(path: Path) -> ServeDeploySchema:
    """The file, its applications' args checked too, before anything is started. Raises StartError and OSError."""
    try:
        schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_bytes()))
        for application in schema.applications:
            if application.import_path == _BUILDER:
                AppArgs.model_validate(application.args)
    except (yaml.YAMLError, ValidationError, ValueError) as error:
        raise StartError(str(error)) from None
    return schema


@contextlib.contextmanager
def only_one(folder: Path, port: int) -> Iterator[None]:
    """While it lasts, no other process serves this port from this checkout. Raises StartError."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"port-{port}.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise StartError(
                f"this checkout serves port {port} already (process {lock.read().strip() or '?'}): end that one first,"
                " or set another http_options.port"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


if __name__ == "__main__":
    sys.exit(main())
