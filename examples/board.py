"""A program for `--runtime command`, to adapt to a phone, a board or a simulator.

    mixnas measure cas_vit_xs --runtime command --command "python examples/board.py {model} {input} {output}"

It takes an ONNX model and an input, runs the model on the device, writes the output and prints the milliseconds of
some passes. Here the device is this machine's own CPU with ONNX Runtime. For a phone, push both files with adb, call a
benchmark binary there, pull the output back, and print the binary's times. For a board, do the same over ssh.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main(model: str, images: str, output: str, passes: int = 20) -> None:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else it reports every session to Microsoft
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: np.load(images)}
    np.save(output, session.run(None, feed)[0])  # the first pass gives the output and warms up
    times_ms = []
    for _ in range(passes):
        start = time.perf_counter()
        session.run(None, feed)
        times_ms.append(1e3 * (time.perf_counter() - start))
    print(json.dumps({"latency_ms": times_ms}))


def demonstrate() -> None:
    """Measures a small network with this program."""
    import shlex

    from nas.measure import measure
    from nas.targets import resolve

    program = (
        f"{shlex.quote(sys.executable)} {shlex.quote(str(Path(__file__).resolve()))} {{model}} {{input}} {{output}}"
    )
    row = measure([resolve("timm:test_vit")], input_size=160, runtime="command", command=program)[0]
    print(f"{row['target']}: {row['latency_ms']:.2f} ms ({row['latency_low_ms']:.2f} to {row['latency_high_ms']:.2f})")


if __name__ == "__main__":
    main(*sys.argv[1:4]) if len(sys.argv) > 1 else demonstrate()
