"""The runtime `command`: a program of the user that times an ONNX model."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ....errors import TrialFailure, UsageError
from ..config import LatencyConfig
from .prepared import Prepared

COMMAND_TRIES = 3
MAX_PRINTED, KEPT_BYTES = 2**26, 2**20
"""Bytes that a call of the command may print, and bytes from the end of the output that are kept."""
_COMMAND_FILES = {"model": "model.onnx", "input": "input.npy", "output": "output.npy"}


def prepare_command(model: bytes, images: torch.Tensor, config: LatencyConfig) -> Prepared:
    """Prepares a user's program, which takes an ONNX file and an input, prints its times and writes its output."""
    assert config.command is not None
    folder = Path(tempfile.mkdtemp(prefix="mixnas-"))
    places = {name: folder / file for name, file in _COMMAND_FILES.items()}
    places["model"].write_bytes(model)
    np.save(places["input"], images.cpu().numpy())
    words = [_fill(word, places) for word in shlex.split(config.command)]

    def time_block(passes: int) -> list[float]:
        # the program decides how many passes one call makes
        return [float(np.median(_call_command(words, config.command_timeout)))]

    weakref.finalize(time_block, shutil.rmtree, folder, ignore_errors=True)  # the files live as long as the function

    def output() -> torch.Tensor:
        time_block(1)
        try:
            return torch.from_numpy(np.load(places["output"], allow_pickle=False)).float()
        except (OSError, ValueError, TypeError, MemoryError) as error:
            raise TrialFailure("runtime", f"the command wrote no NumPy array to {{output}}: {error}") from None

    return Prepared(lambda: time_block(1), time_block, output)


def _fill(word: str, places: dict[str, Path]) -> str:
    for name, path in places.items():
        word = word.replace(f"{{{name}}}", str(path))
    return word


def _call_command(words: list[str], timeout: float) -> list[float]:
    """Calls the command and returns the milliseconds of its passes.

    Raises:
        TrialFailure: if each try failed, printed no times or took too long.
    """
    problem = ""
    for _ in range(COMMAND_TRIES):
        try:
            status, printed, complaints = _run_program(words, timeout)
        except subprocess.TimeoutExpired:
            problem = f"it took longer than {timeout:g} s"
            continue
        except OSError as error:
            raise UsageError(f"the command {words[0]} cannot be run: {error.strerror or error}") from None
        if status:
            last = (complaints.strip() or printed.strip() or "it printed nothing").splitlines()[-1][:200]
            problem = f"exit status {status}: {last}"
            continue
        times_ms = _read_times(printed)
        if times_ms:
            return times_ms
        problem = 'its last line must be JSON such as {"latency_ms": [3.1, 3.0, 3.2]}, with numbers above 0'
    raise TrialFailure("runtime", f"the command failed {COMMAND_TRIES} times: {problem}")


def _run_program(words: list[str], timeout: float) -> tuple[int, str, str]:
    """Runs a program and returns its exit status and the ends of its standard output and standard error.

    After the timeout, or after it has printed `MAX_PRINTED` bytes, the program and all processes that it started are
    killed.

    Raises:
        subprocess.TimeoutExpired: at the timeout.
        OSError: if the program cannot be started.
        TrialFailure: if it prints too much.
    """
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    deadline, printed = time.monotonic() + timeout, 0
    with (
        selectors.DefaultSelector() as waiting,
        subprocess.Popen(words, stdin=nothing, stdout=pipe, stderr=pipe, start_new_session=True) as process,
    ):
        ends: dict[Any, bytes] = {process.stdout: b"", process.stderr: b""}
        for stream in ends:
            waiting.register(stream, selectors.EVENT_READ)
        try:
            while waiting.get_map():
                ready = waiting.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise subprocess.TimeoutExpired(words, timeout)
                for key, _ in ready:
                    chunk = os.read(key.fd, 2**16)
                    printed += len(chunk)
                    ends[key.fileobj] = (ends[key.fileobj] + chunk)[-KEPT_BYTES:]
                    if not chunk:
                        waiting.unregister(key.fileobj)
                if printed > MAX_PRINTED:
                    raise TrialFailure("runtime", f"the command printed more than {MAX_PRINTED:,} bytes")
            process.wait(max(0.0, deadline - time.monotonic()))
        except BaseException:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    output, complaints = (end.decode(errors="replace") for end in ends.values())
    return process.returncode, output, complaints


def _read_times(printed: str) -> list[float]:
    try:
        told = json.loads(printed.strip().splitlines()[-1])["latency_ms"]
        times_ms = [float(t) for t in (told if isinstance(told, list) else [told])]
    except (IndexError, ValueError, TypeError, KeyError):
        return []
    return times_ms if all(0 < t < float("inf") for t in times_ms) else []
