"""All that only a GPU can tell, in two runs of a few minutes: `python -m benchmarks gpu-check`, see main.py."""
