"""Wheels of the installed distributions, so that pip can fill an empty environment without a package index."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import packaging.requirements
import packaging.utils

from tests.patience import LIMIT
from tests.processes import ROOT

BUILD = ("build", "hatchling", "editables")
"""The distributions that `python -m build` needs."""


def requirements_of(name: str, extras: Iterable[str] = (), seen: set[str] | None = None) -> Iterator[str]:
    """A distribution and all its dependencies, as installed in this environment."""
    seen = set() if seen is None else seen
    key = f"{packaging.utils.canonicalize_name(name)}[{','.join(sorted(extras))}]"
    if key in seen:
        return
    seen.add(key)
    try:
        requires = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return
    yield packaging.utils.canonicalize_name(name)
    for one in map(packaging.requirements.Requirement, requires):
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras or {""}):
            yield from requirements_of(one.name, frozenset(one.extras), seen)


def fill(folder: Path, names: Iterable[str]) -> None:
    """Write a wheel of each distribution into the folder."""
    folder.mkdir(exist_ok=True)
    for name in sorted(set(names)):
        _pack(importlib.metadata.distribution(name), folder)


def _pack(distribution: importlib.metadata.Distribution, folder: Path) -> None:
    """Build a wheel from the installed files of a distribution."""
    metadata = distribution.read_text("WHEEL") or ""
    tags = [line.removeprefix("Tag: ") for line in metadata.splitlines() if line.startswith("Tag: ")]
    name = packaging.utils.canonicalize_name(distribution.metadata["Name"]).replace("-", "_")
    stem = f"{name}-{distribution.version}"
    scripts = {point.name for point in distribution.entry_points if point.group == "console_scripts"}
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    with zipfile.ZipFile(folder / f"{stem}-{_compressed(tags)}.whl", "w") as wheel:
        for file in distribution.files or []:
            top = file.parts[0]
            if file.suffix == ".pyc" or file.name in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json"):
                continue
            if top == ".." and (file.parent.name != "bin" or file.name in scripts):
                continue  # pip makes these scripts
            place = f"{stem}.data/scripts/{file.name}" if top == ".." else file.as_posix()
            if top.endswith(".dist-info"):
                place = "/".join([f"{stem}.dist-info", *file.parts[1:]])
            path = Path(str(file.locate()))
            content = path.read_bytes()
            entry = zipfile.ZipInfo(place)
            entry.external_attr = path.stat().st_mode << 16
            wheel.writestr(entry, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            rows.writerow([place, f"sha256={digest}", len(content)])
        rows.writerow([f"{stem}.dist-info/RECORD", "", ""])
        wheel.writestr(f"{stem}.dist-info/RECORD", record.getvalue())


def _compressed(tags: Sequence[str]) -> str:
    """`py2-none-any`, `py3-none-any` -> `py2.py3-none-any`."""
    parts = zip(*(tag.split("-") for tag in tags), strict=True)
    return "-".join(".".join(dict.fromkeys(part)) for part in parts)


def environment(wheelhouse: Path) -> dict[str, str]:
    """The environment of a process without this clone, whose pip finds only these wheels."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("LIGHTBUS_", "PIP_", "PYTEST_", "PYTHON", "MAKE", "MFLAGS", "VIRTUAL_ENV", "COV_"))
    }
    return kept | {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheelhouse),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
        "PIP_CONFIG_FILE": os.devnull,
    }


def empty_environment(folder: Path) -> Path:
    """Create a virtual environment with only pip. Return its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=4 * LIMIT)
    return folder / "bin" / "python"


def build(folder: Path, wheelhouse: Path) -> tuple[Path, Path]:
    """The wheel and the sdist of Lightbus, built with `python -m build`."""
    run([sys.executable, "-m", "build", "--outdir", folder, ROOT], ROOT, wheelhouse)
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    return wheel, sdist


def run(command: Sequence[str | Path], folder: Path, wheelhouse: Path, **more: str) -> str:
    """Run a command that must succeed. Return its output."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(wheelhouse) | more,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=6 * LIMIT,
        check=False,
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}"
    return done.stdout
