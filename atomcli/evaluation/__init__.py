"""How good a checkpoint is: perplexity, divergence from its parent, zero-shot tasks, and gates on them."""
