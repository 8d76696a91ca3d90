"""What a part's process tells the runner, and how."""

from __future__ import annotations

import json
import sys
from typing import Any

MARK = "@@ "  # begins a line of JSON: a result. Everything else that a part prints is for people.
READY: dict[str, Any] = {"ready": True}


class Skip(Exception):
    """Raised by a part that cannot run here, with the reason."""


def command(work: str, rehearse: bool, **arguments: Any) -> list[str]:
    words = [sys.executable, "-m", "benchmarks.gpu_check.worker", work, json.dumps(arguments)]
    return [*words, "--rehearse"] if rehearse else words


def tell(result: dict[str, Any]) -> None:
    print(f"\n{MARK}{json.dumps(result)}", flush=True)
