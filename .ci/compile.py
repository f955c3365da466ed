"""What hatchling runs to compile the engine into a wheel; without a C compiler the wheel is one of pure Python.

`ASENA_TORNADO_PURE=1` leaves it out, too.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from setuptools import Distribution, Extension

PLACE = Path("asena_tornado/connection")
NAME = "_engine"


class CompiledEngine(BuildHookInterface[Any]):
    """See `[tool.hatch.build.targets.wheel.hooks.custom]`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and have the result packed. An editable installation imports it from beside its source."""
        self._work = tempfile.mkdtemp()
        built = self._compile()
        if built is None:
            return
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"cp311-abi3-{platform}"
        if version == "editable":
            beside = Path(self.root, PLACE, built.name)
            beside.unlink(missing_ok=True)  # not overwritten: a process may run it
            shutil.copy(built, beside)
        else:
            build_data["force_include"][str(built)] = str(PLACE / built.name)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Clean up."""
        shutil.rmtree(self._work)

    def _compile(self) -> Path | None:
        if os.name != "posix" or sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
            return None
        if os.environ.get("ASENA_TORNADO_PURE", "0") not in ("", "0"):
            return None
        extension = Extension(NAME, [str(Path(self.root, PLACE, f"{NAME}.c"))], py_limited_api=True, optional=True)
        command: Any = Distribution({"name": NAME, "ext_modules": [extension]}).get_command_obj("build_ext")
        command.build_lib = command.build_temp = self._work
        command.ensure_finalized()
        command.run()
        return next(Path(self._work).glob(f"{NAME}*.so"), None)
