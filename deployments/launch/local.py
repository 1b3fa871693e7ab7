"""`make serve`: a local Ray and the application of a YAML file, in the foreground, until Ctrl-C or SIGTERM.

    python -m deployments.launch.local deployments/tiny.yaml

It checks the file, its port, and that this checkout does not serve that port already, then runs
`serve run --address local`.
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
"""A process between this one and `serve run` that ends what is left of Ray when this process is killed."""
_BUILDER = "deployments.app:build"


class StartError(RuntimeError):
    """The application was not started; the message has the reason."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 where nothing was started, 128 + the number of the signal that ended it."""
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
    """The validated content of the file, including its applications' args. Raises StartError and OSError."""
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
    """Hold a lock for serving this port from this checkout. Raises StartError where another process holds it."""
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
