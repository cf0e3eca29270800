"""Training: a recipe, the text that ships with Python, and a decoder become a Hugging Face
directory."""
