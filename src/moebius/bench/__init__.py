"""Benchmarks: load on any OpenAI-compatible server, on this engine, and on this engine less one
technique at a time."""
