"""A corpus through a model: what its routers do with it, as a report to read and as JSON."""
