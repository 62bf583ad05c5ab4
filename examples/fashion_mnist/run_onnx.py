"""Run an exported network in ONNX Runtime on the test images, without secateur or its weights."""

import argparse

import onnxruntime
from data import loaders


def main() -> None:
    """Print the accuracy of an ONNX file on the 10,000 test images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="an ONNX file")
    session = onnxruntime.InferenceSession(parser.parse_args().file)
    (taken,) = session.get_inputs()
    right = seen = 0
    for images, labels in loaders()["test"]:
        (logits,) = session.run(None, {taken.name: images.numpy()})
        right += int((logits.argmax(1) == labels.numpy()).sum())
        seen += len(labels)
    print(f"ONNX Runtime {onnxruntime.__version__}: {right / seen:.2%} of {seen:,} images right")


if __name__ == "__main__":
    main()
