"""Model directories: their configuration, their tensors, and the decoder."""
