"""Between processes: keyed channels of whole frames, and the exchange of rows between ranks."""
