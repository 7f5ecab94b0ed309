"""How fast a checkpoint and its kernels are, beside what one would use instead."""
