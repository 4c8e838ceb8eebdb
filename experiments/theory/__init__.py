"""The paper's theory, checked in numbers."""
