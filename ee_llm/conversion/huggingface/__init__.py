"""Models of Hugging Face: their settings and tensors, the Hub, and GGUF files."""
