"""What a first reading skips, one concept a file."""
