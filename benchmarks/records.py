"""What benchmarks leave behind: JSON, and the processor that it is of."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any


def save(path: Path | None, record: Any) -> None:
    """Write a record where one is wanted; over another record, and over nothing else."""
    from moebius.files import json_record, write_file

    if path is not None:
        write_file(path, json.dumps(record, indent=2) + "\n", ours=json_record)


def processor() -> str:
    """The processor's name, where the system tells it."""
    with Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.machine()
