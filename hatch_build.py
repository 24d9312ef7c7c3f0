"""Compile the C form of the smoothing noise into the wheel where there is a C compiler. Without one the numpy form is all there is: the same bits, slower."""

import pathlib
import runpy
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BuildHook(BuildHookInterface):
    """Of wheels, editable ones included. HATCH_BUILD_NO_HOOKS=true makes a wheel for every machine."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        folder = "certify/smoothing/noise"
        reason = runpy.run_path(str(pathlib.Path(self.root) / folder / "build.py"))["build"]()
        if reason is not None:
            self.app.display_warning(f"smoothing noise is not compiled, numpy draws the same in ten times the time: {reason}")
            return
        build_data["artifacts"].append(f"{folder}/_noise.so")
        build_data.update(pure_python=False, infer_tag=True)
