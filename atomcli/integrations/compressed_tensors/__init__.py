"""compressed-tensors: the format that transformers, vLLM and SGLang read without atom.

Written here from its specification (https://github.com/vllm-project/compressed-tensors), which the library itself
checks in the tests; nothing of it is imported.
"""
