"""What processes and machines that serve one model say to each other."""
