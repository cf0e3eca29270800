"""The supported architectures, a file each: see moebius.models.family."""
