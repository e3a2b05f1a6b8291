"""The script that measures on a GPU runs on a CPU as well, at a size for that."""

import re
import subprocess
import sys

from conftest import ROOT

SCRIPT = ROOT / "tracer/huggingface/measure_gpu.py"


def test_tells_time_and_size(tmp_path):
    result = subprocess.run(
        [sys.executable, SCRIPT, "--device", "cpu", "--tokens", "300", "--new-tokens", "3", "--layers", "2", "--hidden",
         "64", "--heads", "4", "--kv-heads", "2", "--vocabulary", "200", "--repeat", "1", "--folder", tmp_path],
        capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search(r"alone [\d.]+ s, captured [\d.]+ s: [\d.]+ times", result.stdout)
    assert re.search(r"trace [\d.e-]+ GB: [\d.e-]+ GB/s", result.stdout)
    assert "GPU memory" not in result.stdout
    assert not list(tmp_path.iterdir())
