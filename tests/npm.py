"""Packages from npm, for the tests that run JavaScript."""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest


def installed(tmp_path_factory: pytest.TempPathFactory, name: str, *packages: str) -> Path:
    """The node_modules with these packages; kept in ``name`` where ``ASENA_TEST_NPM`` says, if it does."""
    base = tmp_path_factory.getbasetemp()
    # One for all of xdist's workers, whose own directories are in the run's.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    where = Path(os.environ.get("ASENA_TEST_NPM") or shared) / name
    where.mkdir(parents=True, exist_ok=True)
    with (where / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (where / "node_modules").is_dir():
            _install(where, packages)
    return where / "node_modules"


def _install(where: Path, packages: tuple[str, ...]) -> None:
    """Skips the test where that is not possible, except in CI, which must not pass without it."""
    give_up: Callable[[str], NoReturn] = pytest.fail if os.environ.get("CI") else pytest.skip
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        give_up("no node and npm on PATH")
    command = [npm, "install", "--prefix", str(where), "--no-audit", "--no-fund", "--ignore-scripts", *packages]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        shutil.rmtree(where / "node_modules", ignore_errors=True)
        give_up(f"npm cannot install what the tests need: {done.stderr[-500:]}")
