import os
import sys

from .info import main

try:
    main()
    sys.stdout.flush()
except BrokenPipeError:  # of `| head`; at exit Python would flush once more
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
