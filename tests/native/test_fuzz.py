"""The raw kernels under AddressSanitizer and UndefinedBehaviorSanitizer, fuzzed at every SIMD level of this CPU."""

import subprocess

import pytest
from native.build import build, compiler

SANITIZERS = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
LEVELS = ("baseline", "avx2", "avx512", "vnni")
SECONDS = 3
ABSENT = 3  # what the driver exits with where the CPU lacks a level


@pytest.fixture
def sanitizers(tmp_path):
    """Skips where programs with sanitizers cannot be built."""
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    command = [compiler() or "c++", *SANITIZERS, str(probe), "-o", str(tmp_path / "probe")]
    if compiler() is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("fuzzing needs a C++ compiler with AddressSanitizer and UndefinedBehaviorSanitizer")


@pytest.mark.slow
def test_the_kernels_keep_the_contract_and_their_bounds_at_every_level(sanitizers, tmp_path):
    program = build("fuzz", tmp_path, *SANITIZERS)
    ran = []
    for level in LEVELS:
        done = subprocess.run([str(program), level, str(SECONDS), "1"], capture_output=True, text=True, check=False)
        assert done.returncode in (0, ABSENT), f"{level}: {done.stdout}{done.stderr[:4000]}"
        if done.returncode == 0:
            ran.append(level)
            assert int(done.stdout.split()[0]) > 100, done.stdout
    assert "baseline" in ran
