"""The engine with each technique taken away in turn: variants, a replay of requests, a table."""
