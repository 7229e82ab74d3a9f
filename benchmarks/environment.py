"""The virtual environment of the peers, `.venv-bench`. It is created again when requirements.txt changes."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".venv-bench"
REQUIREMENTS = Path(__file__).parent / "requirements.txt"


def prepare() -> tuple[Path, list[str]]:
    """Create the environment if needed. Return its Python, and the requirements that could not be installed.

    Raises:
        RuntimeError: the environment could not be created.
    """
    python = FOLDER / "bin" / "python"
    ready = FOLDER / "ready"
    key = hashlib.sha256(REQUIREMENTS.read_bytes() + f"{sys.version}{FOLDER}".encode()).hexdigest()
    if ready.exists():
        made_for, *missing = ready.read_text().splitlines()
        if made_for == key:
            return python, missing
    print(f"Setting up {FOLDER.name} with the peers ...", flush=True)
    shutil.rmtree(FOLDER, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(FOLDER)], 120)
    (FOLDER / ".gitignore").write_text("*\n")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet", "install"]
    missing = []
    try:
        _run([*pip, "--requirement", str(REQUIREMENTS)], 600)
    except RuntimeError:
        # Install one by one: a peer that cannot be installed (on a newer Python) must not prevent the others.
        lines = [line for line in REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")]
        for line in lines:
            try:
                _run([*pip, line], 300)
            except RuntimeError as error:
                missing.append(line)
                print(f"  {line} cannot be installed: {str(error).strip().splitlines()[-1]}", flush=True)
    ready.write_text("\n".join([key, *missing]))
    return python, missing


def versions(python: Path) -> dict[str, str]:
    """The versions of the installed distributions, by name."""
    listed = _run([str(python), "-m", "pip", "--disable-pip-version-check", "list", "--format=freeze"], 60)
    return dict(line.split("==", 1) for line in listed.splitlines() if "==" in line)


def _run(command: list[str], timeout: float) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout
