"""Load generators and their figures, against any server."""
