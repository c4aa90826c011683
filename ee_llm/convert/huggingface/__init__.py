"""What is particular to models from the Hugging Face hub: their settings, the hub, GGUF files."""
