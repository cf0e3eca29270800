"""What a front asks of an engine, and how that ends: records that both sides share."""
