"""What CUDA would run, counted without one: launches, the bytes they move, matrix products, and a predicted time."""
