import sys
from pathlib import Path

# The benchmarks are not installed: they are run, and tested, from the repository root.
sys.path.insert(0, str(Path(__file__).parents[2]))
