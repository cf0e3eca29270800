"""benchmarks/peers/run.py, as far as it goes without the peers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).parents[2] / "benchmarks" / "peers" / "run.py"


def test_a_record_never_replaces_what_is_none(tmp_path: Path) -> None:
    """It is said before the run, which may take hours."""
    notes = tmp_path / "notes.txt"
    notes.write_text("a year of notes")
    done = subprocess.run(
        [sys.executable, str(RUN), "--json", str(notes)],
        env=os.environ | {"PEERS": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("run.py: ") and "holds something else" in done.stderr
    assert notes.read_text() == "a year of notes"
