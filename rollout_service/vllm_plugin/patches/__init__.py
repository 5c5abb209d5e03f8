"""Functions of vLLM 0.32 that are wrong or very slow on the CPU, each with its reason, self-test, and replacement.

Each is replaced only when its self-test fails, and a log line says so. A vLLM that has been fixed is left as it is. The
self-tests run the function as vLLM would (kernel overrides registered) on tensors of a few numbers.
"""
