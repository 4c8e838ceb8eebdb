"""Tests on a real SLURM cluster, made of namespaces on this machine: `make test-cluster`."""
