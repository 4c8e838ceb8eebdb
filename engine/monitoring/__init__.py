"""What is told of a run: terminal, TensorBoard, figures."""
