"""The compiler: from an ordinary ONNX file to one whose sparse layers run in our operators."""
