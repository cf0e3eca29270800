"""Training: a recipe, texts and a decoder become a Hugging Face directory."""
