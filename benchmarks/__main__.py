"""`python -m benchmarks NAME [--json FILE] [options]`; without a name, the list of what there is."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

import typer
from rich.console import Console
from rich.table import Table

import benchmarks
from common.errors import ParamserverError


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark that the first argument names; returns the exit code."""
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            _list()
            return 0
        benchmark = benchmarks.load(arguments[0])
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(help=benchmark.summary)(benchmark.run)
        app(list(arguments[1:]), prog_name=f"python -m benchmarks {benchmark.name}")
    except ParamserverError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _list() -> None:
    table = Table("name", "question", box=None, header_style="bold")
    for name in benchmarks.names():
        table.add_row(name, benchmarks.load(name).summary)
    console = Console()
    console.print("python -m benchmarks NAME [--json FILE] [options]; NAME --help lists the options\n", markup=False)
    console.print(table)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # an end that closes what is open
    sys.exit(main(sys.argv[1:]))
