"""The Ray actor around one vLLM engine. May import vllm_plugin."""
