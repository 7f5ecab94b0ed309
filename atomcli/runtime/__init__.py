"""A quantized model that runs, in the pipeline as well as in the user's hands."""
