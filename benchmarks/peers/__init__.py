"""What others would write: the same stages without this project's code."""
