"""The model `ee_llm` of EleutherAI's lm-evaluation-harness (the package lm_eval)."""
