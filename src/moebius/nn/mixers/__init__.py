"""Mixers other than attention: a file each, with its record and its module (moebius.nn.mixer)."""
