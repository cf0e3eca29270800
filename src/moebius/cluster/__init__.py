"""A front's engine processes, on one host or several: started, watched, and formed into groups."""
