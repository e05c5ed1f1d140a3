"""Generation with vLLM, in this process."""

import logging
import os

# vLLM reads these while it is imported, so they are set before any module of this folder imports it.
# One process is a requirement, not a default: the in-process weight transfer hands tensors over by reference.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# vLLM configures its logger only when an engine is built; what it says before that follows the same level.
logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
