"""GGUF: the file that llama.cpp reads; written through the `gguf` package, one block at a time."""
