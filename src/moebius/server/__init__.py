"""The HTTP front door: OpenAI's API over an EngineClient."""
