"""How large everything is: on a GPU, and in a rehearsal on a CPU, which has to be done in a minute or two."""

from benchmarks.networks import Scale

GPU = Scale("cuda")
REHEARSAL = Scale("cpu", batch=1, rounds=2, small=True, compiler="aot_eager")
