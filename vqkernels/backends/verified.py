"""What was verified on real hardware: the package's own table, and the user's, written by `vqkernels verify`.

Both are `{"format": 1, "verified": [entry, ...]}`. An entry vouches for one `Key`, and says besides with which GPU and
torch it was seen. Entries of older versions have the compiler under "triton".
"""

import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

FORMAT = 1
PACKAGE = Path(__file__).with_name("verified.json")


class Key(NamedTuple):
    """What a verification vouches for."""

    capability: str  # "9.0"
    source: str  # hash of the kernels' source
    compiler: str  # "3.6" is that version of Triton; of the CUDA kernels "nvcc 13.0"


def user_path() -> Path:
    """The user's own table: vqkernels/verified.json below XDG_CACHE_HOME, or below ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "vqkernels" / "verified.json"


def where(key: Key) -> str | None:
    """Which table vouches for `key`: "the package", the user's file by its path, or None."""
    for path, name in ((PACKAGE, "the package"), (user_path(), str(user_path()))):
        if any(all(entry.get(field) == value for field, value in key._asdict().items()) for entry in _entries(path)):
            return name
    return None


def record(key: Key, facts: dict[str, str]) -> Path:
    """Add an entry to the user's table, in place of an older one of the same key. Raises OSError."""
    path = user_path()
    entry = key._asdict()
    kept = [old for old in _entries(path) if any(old.get(field) != value for field, value in entry.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "verified": [*kept, entry | facts]}, indent=1) + "\n"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
    return path


def _entries(path: Path) -> list[dict[str, str]]:
    """The entries of a table; none where it is absent, damaged or of another format: then nothing is vouched for."""
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    if not isinstance(table, dict) or table.get("format") != FORMAT or not isinstance(table.get("verified"), list):
        return []
    entries = [entry for entry in table["verified"] if isinstance(entry, dict)]
    return [{"compiler": entry["triton"], **entry} if "triton" in entry else entry for entry in entries]
