"""A SLURM cluster of namespaces, and what its jobs run."""
