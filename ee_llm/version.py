"""The version of ee_llm."""

__version__ = "0.1.0"
