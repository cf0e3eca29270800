"""Building blocks of a decoder. Each takes its backend (`Ops`) when it is built."""
