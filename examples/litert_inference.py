"""Classify images with an exported LiteRT file: ai-edge-litert, NumPy and Pillow, no torch.

    python litert_inference.py EXPORT IMAGES [--file model.int8.tflite] [--each]

EXPORT is a folder made by `mixnas export … --format litert,litert-int8`. The program decodes and prepares images as
`onnx_inference.py` does, which must lie in the same folder, and takes the same arguments.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from onnx_inference import start


def load_litert(file: Path) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """Returns the network as a function from images to logits, and its batch size."""
    interpreter = Interpreter(model_path=str(file))
    interpreter.allocate_tensors()
    (given,), (made,) = interpreter.get_input_details(), interpreter.get_output_details()

    def network(images: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(given["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(made["index"])

    return network, int(given["shape"][0])


if __name__ == "__main__":
    start(__doc__, load_litert, ("model.tflite", "model.int8.tflite"), ("litert",))
