"""The process of a part: python -m benchmarks.gpu_check.worker MODULE:FUNCTION '{"argument": ...}' [--rehearse].

FUNCTION, of a module beside this one, takes a Scale and the arguments and yields results, each of which is written at
once. What it does before it yields READY may run beside other parts; after it, it has the machine to itself.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import signal
import sys

from benchmarks.gpu_check.protocol import READY, Skip, tell
from benchmarks.gpu_check.scale import GPU, REHEARSAL


def main(work: str, arguments: str, *rest: str) -> int:
    # Where it crashes or hangs, it tells where.
    faulthandler.enable()
    faulthandler.register(signal.SIGINT, chain=True)
    module, function = work.split(":")
    try:
        part = getattr(importlib.import_module(f"benchmarks.gpu_check.{module}"), function)
        for result in part(REHEARSAL if "--rehearse" in rest else GPU, **json.loads(arguments)):
            tell(result)
            if result is READY and not sys.stdin.readline():
                return 1  # whoever was to give the word is gone
    except Skip as reason:
        tell({"verdict": "skipped", "detail": str(reason)})
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
