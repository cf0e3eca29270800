"""Benchmarks: load on any OpenAI-compatible server, and on this engine."""
