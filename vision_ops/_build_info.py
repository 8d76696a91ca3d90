"""What setup.py built; needs no torch."""

import json
from pathlib import Path
from typing import Any


def read_build_info() -> dict[str, Any]:
    """What setup.py wrote down."""
    try:
        return json.loads((Path(__file__).parent / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}


def gpu_code(archs: list[str], capability: int) -> str | None:
    """Which code of a binary a GPU runs: cubins are for their own major version, PTX for everything newer."""
    cubins = [int("".join(filter(str.isdigit, a))) for a in archs if "PTX" not in a]
    ptx = [int("".join(filter(str.isdigit, a))) for a in archs if "PTX" in a]
    if any(a // 10 == capability // 10 and a <= capability for a in cubins):
        return "compiled for it"
    if any(a <= capability for a in ptx):
        return "PTX, compiled by the driver at the first call"
    return None
