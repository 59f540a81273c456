"""Ctrl-C on the real command: one line, no half report."""

import signal
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

# What a shell starts in the background ignores Ctrl-C, and so would these tests and the command in them.
LISTENING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from stem_attention.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_an_interrupted_run_prints_no_half_report_and_leaves_no_picture(tiny_llama, tmp_path):
    picture = tmp_path / "picture.png"
    arguments = [
        "run", "--model", str(tiny_llama), "--context", "1700", "--max-new-tokens", "200", "--dense-below", "0",
        "--policy", "mass:block_size=32", "--json", "--plot", str(picture),
    ]  # fmt: skip
    command = [sys.executable, "-c", LISTENING, *arguments]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any("dense: prefill" in line for line in process.stderr)  # its bar is drawn when that reading is over
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=240)
    assert (process.returncode, printed) == (130, ""), err
    assert err.splitlines()[-1] == "stem-attention: interrupted"
    assert "Traceback" not in err
    assert not picture.exists()
