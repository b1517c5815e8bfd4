"""The execution of plans: the loop, its kernels, CUDA graphs, and how many samples at a time."""
