"""An export for elsewhere: a file for ONNX's runtimes, a repository on the hub."""
