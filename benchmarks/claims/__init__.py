"""The papers' claims at small scale: which runs there are, how one is made and measured, what they
say together."""
