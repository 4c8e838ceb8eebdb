"""What a run reports: terminal lines, TensorBoard, pictures, FLOPs."""
