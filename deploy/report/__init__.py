"""The report of a run: `report.json` for scripts, and `report.html`, the page to show others.

    summary of the run + run.1.jsonl, run.jsonl  ->  figures (plain values)  ->  report.json, report.html
                          `log`                       `figures`                               `page`, its `charts`

Laws
* The page shows nothing that `report.json` does not hold: `page` takes those figures and nothing else.
* Each file is written whole or not at all.
* Imports go one way: `page` sees `charts` and `figures`; `log`, `markup` and `style` see none of the others.

Left out: the summary itself (whoever ran the workers measures it), and comparing runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.errors import StateError
from deploy.report import figures, log, page


def write(directory: Path, summary: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into `directory`, each whole or not at all; returns their paths.

    Reads the run log that lies there. `summary` is what is known of the run beside it, JSON-like values by name.
    Raises StateError where the disk does not take them.
    """
    report = figures.figures(summary, log.read(directory, log.finite(summary.get("started"))))
    texts = {"report.json": json.dumps(report, indent=1, allow_nan=False) + "\n", "report.html": page.page(report)}
    for name, text in texts.items():
        temporary = directory / f".{name}.{os.getpid()}"
        try:
            temporary.write_text(text, encoding="utf-8", errors="replace")
            temporary.replace(directory / name)
        except OSError as error:
            raise StateError(
                f"The report cannot be written: {directory / name}: {error.strerror or error}.",
                fix="The run itself is not harmed: checkpoints and run log are as they were. Make room.",
            ) from None
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    return directory / "report.json", directory / "report.html"
