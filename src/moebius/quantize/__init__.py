"""Weights into block formats: quantisers, what a recipe gives each tensor, GGUF files of it."""
