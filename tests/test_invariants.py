"""Nothing that a user sees has changed: the record of tests/invariants.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("invariants.py")


@pytest.mark.slow
def test_names_states_options_and_bits_are_those_recorded():
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("as recorded")
