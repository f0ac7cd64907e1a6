"""An environment of its own with TensorRT-RTX, which builds engines on machines without a GPU."""

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PACKAGE = "tensorrt-rtx==1.7.1.116"
WAIT = 180  # seconds


@functools.cache
def rtx_python():
    """(its interpreter, "") or ("", why there is none), once a run.

    One that lies in `.venv-rtx` at the checkout's root is taken as it is.
    """
    root = Path(__file__).parents[2]
    if (root / ".venv-rtx" / "bin" / "python").exists():
        return str(root / ".venv-rtx" / "bin" / "python"), ""
    if os.environ.get("CI"):
        return "", "TensorRT-RTX is not installed in CI; make .venv-rtx with it to run this"
    place = Path(tempfile.gettempdir()) / f"vivace-rtx-{os.getuid()}-{os.getpid()}"
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    try:
        venv.create(place, with_pip=True)
        python = str(place / "bin" / "python")
        options = ["--quiet", "--disable-pip-version-check", "--retries", "0", "--timeout", "20"]
        command = [python, "-m", "pip", "install", *options, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return "", f"{PACKAGE} cannot be installed here: {error}"
    if done.returncode:
        return "", f"{PACKAGE} cannot be installed here: {done.stderr.strip().rpartition(chr(10))[2][:200]}"
    return python, ""


if __name__ == "__main__":
    print(*rtx_python(), sep="", file=sys.stdout)
