"""Generation with vLLM."""

import logging
import os

# vLLM reads these while it is imported, so they are set before any module of this folder imports it.
# The scheduler in this process is a requirement, not a default: the in-process weight transfer hands tensors over by
# reference, and the routed experts are read from the model runner.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# By default vLLM binds each worker process on CPUs to a separate NUMA node, and fails if there are fewer.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# vLLM configures its logger only when an engine is built; what it says before that follows the same level.
logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
