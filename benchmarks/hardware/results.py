"""Result files: JSON, rewritten in one piece after every row, so that whatever ends the run leaves complete files."""

import json
import os
from pathlib import Path
from typing import Any


class Results:
    """At most one file per stage, each with the facts of the machine and the rows so far."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.facts = folder, facts
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def add(self, stage: str, row: dict[str, Any]) -> None:
        """Append a row to the stage's file."""
        self.rows.setdefault(stage, []).append(row)
        self._write(f"{stage}.json", json.dumps({"machine": self.facts, "rows": self.rows[stage]}, indent=1) + "\n")

    def summary(self, text: str) -> None:
        """Rewrite summary.txt."""
        self._write("summary.txt", text)

    def _write(self, name: str, text: str) -> None:
        half = self.folder / f".{name}.half"
        half.write_text(text)
        os.replace(half, self.folder / name)
