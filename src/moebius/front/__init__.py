"""What stands between the doors (LLM, server, bench) and the engines: all that knows text.

A front opens the choices of a prompt, hands them to an engine as copies, and makes text and results
of the tokens that come back. What it keeps of a choice (prompt, sampling parameters, seed, tokens
so far) is what asking another engine for the rest would take.
"""
