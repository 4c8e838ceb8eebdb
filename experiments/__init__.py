"""The paper's tables and figures as sweeps, their report, the theory check."""
