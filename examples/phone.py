"""Measures a network on an Android phone, as a program for `--runtime command`.

    mixnas measure cas_vit_xs --runtime command --command-timeout 900 \\
        --command "python examples/phone.py {model} {input} {output} --threads 4 --max-temperature 35"

It pushes the ONNX model and the input with adb, runs ONNX Runtime's own programs there, pulls the output and the times
back, and removes its files from the phone. `onnxruntime_perf_test` times the passes. It keeps no output, so the output
comes from `onnx_test_runner -I`, which runs the same file with the same library, execution provider and optimisation
level. Both come from a build of ONNX Runtime for Android, 1.23 or later. Push them to /data/local/tmp once, together
with libonnxruntime.so if it is a separate file, and make them executable.

With `--tool litert`, a program of yours (`--convert`) first turns the ONNX file into a .tflite file, and LiteRT's
`benchmark_model` times it. The output is then that of the last timed pass.

An execution provider or delegate may leave operators to the CPU. This program does not count them. It needs numpy and
onnx, and a phone with Android 7 or later. Only one measurement can run on a phone at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

HOME = "/data/local/tmp"
FOLDER = f"{HOME}/mixnas-phone"
"""Where the files of a measurement lie on the phone. It is deleted before and after each one."""
ZONES = "for zone in /sys/class/thermal/thermal_zone*; do echo $(cat $zone/type) $(cat $zone/temp); done 2>/dev/null"


def fail(problem: str) -> NoReturn:
    """Ends the program with one line, which mixnas shows."""
    sys.exit(" ".join(problem.split()))


def run(words: list[str], name: str) -> str:
    """Runs a program of this machine, `name` in messages, and returns what it printed, standard error last."""
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        fail(
            f"{words[0]} is not on this machine's PATH: install it" + " (Android platform tools)" * (words[0] == "adb")
        )
    except OSError as error:
        fail(f"{words[0]} cannot be run: {error.strerror or error}")
    printed = done.stdout + done.stderr
    if done.returncode:
        last = (printed.strip() or "it printed nothing").splitlines()[-1]
        fail(f"{name} ended with status {done.returncode}: {last}")
    return printed


@dataclass(frozen=True)
class Phone:
    """A phone that adb reaches.

    Args:
        serial: its serial number, as `adb devices` prints it.
    """

    serial: str

    def shell(self, *words: str, name: str = "") -> str:
        """Runs a command on the phone. Its words reach the program as they are, whatever they contain."""
        return self.script(shlex.join(words), name or words[0])

    def script(self, text: str, name: str) -> str:
        """Runs a line of the phone's shell."""
        return run(["adb", "-s", self.serial, "shell", text], f"{name} on the phone")

    def push(self, file: Path, place: str) -> None:
        """Copies a file to the phone."""
        run(["adb", "-s", self.serial, "push", str(file), place], "adb push")

    def pull(self, place: str, file: Path) -> bytes:
        """Copies a file from the phone and returns its content."""
        run(["adb", "-s", self.serial, "pull", place, str(file)], "adb pull")
        return file.read_bytes()


def choose_phone(serial: str | None) -> Phone:
    """Returns the phone with this serial number, or the only one."""
    printed = run(["adb", "devices"], "adb devices").partition("List of devices attached")[2]
    found = dict(line.split("\t", 1) for line in printed.splitlines() if "\t" in line)
    seen = ", ".join(f"{name} ({state})" for name, state in found.items()) or "none"
    if serial is None:
        if not found:
            fail("adb sees no phone: connect one and allow USB debugging on it")
        if len(found) > 1:
            fail(f"adb sees several phones: choose one by --serial ({seen})")
        (serial,) = found
    if serial not in found:
        fail(f"adb does not see the phone {serial}: it sees {seen}")
    if found[serial] != "device":
        fail(f"the phone {serial} is not ready ({found[serial]}): unlock it and allow USB debugging")
    return Phone(serial)


def place_program(phone: Phone, program: str, name: str) -> str:
    """Returns the place of a program on the phone; pushes it first if it is a file of this machine."""
    if Path(program).is_file():
        phone.push(Path(program), f"{FOLDER}/{name}")
        phone.shell("chmod", "755", f"{FOLDER}/{name}")
        return f"{FOLDER}/{name}"
    if "executable" not in phone.script(f"test -x {shlex.quote(program)} && echo executable; true", "test"):
        fail(
            f"the phone has no program {program}: push it there and make it executable, or name a file of this machine"
        )
    return program


def launch(phone: Phone, arguments: argparse.Namespace, program: str, *words: str) -> str:
    """Runs a program of the phone, on the chosen cores and with its libraries; returns what it printed."""
    folder, _, name = program.rpartition("/")
    cores = ["taskset", arguments.cores] if arguments.cores else []
    libraries = f"LD_LIBRARY_PATH={folder}:{HOME}"
    return phone.shell("env", libraries, *cores, program, *arguments.arguments, *words, name=name)


def temperature(phone: Phone, zone: str | None) -> float:
    """Returns the temperature of the battery, or of a thermal zone, in °C."""
    if zone is None:
        tenths = re.search(r"^\s*temperature: (-?\d+)\s*$", phone.shell("dumpsys", "battery"), re.MULTILINE)
        return int(tenths[1]) / 10 if tenths else fail("`dumpsys battery` prints no temperature: pass --thermal-zone")
    zones = dict(re.findall(r"^(\S+) (-?\d+)\s*$", phone.script(ZONES, "reading the thermal zones"), re.MULTILINE))
    if zone not in zones:
        fail(f"the phone has no readable thermal zone {zone}: it has {', '.join(sorted(zones)) or 'none'}")
    return int(zones[zone]) / 1000


def cool_down(phone: Phone, arguments: argparse.Namespace) -> None:
    """Waits `--cool-down` seconds, then until the phone is cool enough."""
    time.sleep(arguments.cool_down)
    if arguments.max_temperature is None:
        return
    end = time.monotonic() + arguments.max_wait
    while (now := temperature(phone, arguments.thermal_zone)) > arguments.max_temperature:
        if time.monotonic() > end:
            fail(
                f"the phone still has {now:.1f} °C after {arguments.max_wait:g} s: cool it, or raise "
                "--max-temperature, or --max-wait with --command-timeout"
            )
        time.sleep(arguments.max_wait / 100)


def perf_test_times(text: str, runs: int) -> list[float]:
    """Reads the milliseconds of each pass from the result file of `onnxruntime_perf_test`.

    A line holds the model's name, the seconds of the pass, the peak memory, the CPU usage and the number of the pass.
    Some releases also write the time until the pass was submitted, before the seconds of the pass.
    """
    lines = [line.split(",") for line in text.splitlines() if line.strip()]
    try:
        times_ms = [1e3 * float(fields[-4]) for fields in lines if len(fields) in (5, 6)]
    except ValueError:
        times_ms = []
    if len(times_ms) != runs:
        fail(f"onnxruntime_perf_test wrote {len(times_ms)} times that can be read, not {runs}: {text[:100]}")
    if not all(0 < value < math.inf for value in times_ms):
        fail(f"onnxruntime_perf_test wrote {runs} times that cannot be: {min(times_ms):g} to {max(times_ms):g} ms")
    return times_ms


def benchmark_model_time(text: str) -> float:
    """Reads the milliseconds of a pass, the median or else the mean, from what `benchmark_model` printed."""
    lines = re.findall(r"^(?:INFO: )?(count=\d+ .*)$", text, re.MULTILINE)
    figures = dict(re.findall(r"(\w+)=([\d.e+]+)", lines[-1] if len(lines) == 2 else ""))
    time_ms = float(figures.get("median") or figures.get("avg") or figures.get("curr") or "nan") / 1e3
    if not 0 < time_ms < math.inf:
        last = (text.strip() or "nothing").splitlines()[-1]
        fail(f"benchmark_model printed no times of a warm-up and of passes that can be read, but last: {last[:200]}")
    return time_ms


def measure_onnxruntime(phone: Phone, arguments: argparse.Namespace, here: Path) -> tuple[object, list[float]]:
    """Returns the output and the milliseconds of each pass of an ONNX model in ONNX Runtime."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(arguments.model, load_external_data=False).graph
    tensor = numpy_helper.from_array(np.load(arguments.input), graph.input[0].name)
    (here / "input_0.pb").write_bytes(tensor.SerializeToString())
    timer = place_program(phone, arguments.program or f"{HOME}/onnxruntime_perf_test", "onnxruntime_perf_test")
    runner = place_program(phone, arguments.runner, "onnx_test_runner")
    case = f"{FOLDER}/case"  # both programs take each folder beside the model for inputs
    phone.shell("mkdir", "-p", f"{case}/test_data_set_0")
    phone.push(arguments.model, f"{case}/model.onnx")
    phone.push(here / "input_0.pb", f"{case}/test_data_set_0/input_0.pb")
    shared = ("-e", arguments.provider, "-o", "99")
    launch(phone, arguments, runner, "-I", "-j", "1", "-c", "1", *shared, case)
    pulled = phone.pull(f"{case}/test_data_set_0/actual_output_0.pb", here / "actual_output_0.pb")
    output = numpy_helper.to_array(onnx.TensorProto.FromString(pulled))
    cool_down(phone, arguments)
    times = ("-m", "times", "-r", str(arguments.runs), "-x", str(arguments.threads))
    launch(phone, arguments, timer, *times, *shared, f"{case}/model.onnx", f"{FOLDER}/times.csv")
    text = phone.pull(f"{FOLDER}/times.csv", here / "times.csv").decode(errors="replace")
    return output, perf_test_times(text, arguments.runs)


def measure_litert(phone: Phone, arguments: argparse.Namespace, here: Path) -> tuple[object, list[float]]:
    """Returns the output and the median milliseconds of a pass of the converted model in LiteRT."""
    import numpy as np
    import onnx

    if arguments.convert is None:
        fail("--tool litert needs --convert PROGRAM, which is called with the ONNX file and the .tflite file to write")
    converted = arguments.model.with_suffix(".tflite")  # all calls for one network share it, until mixnas deletes it
    if not converted.exists():
        made = here / converted.name
        run([*shlex.split(arguments.convert), str(arguments.model), str(made)], arguments.convert)
        shutil.copyfile(made, converted)
    images = np.load(arguments.input)
    taken = images.transpose(0, 2, 3, 1) if arguments.nhwc else images
    (here / "input.bin").write_bytes(np.ascontiguousarray(taken).tobytes())
    timer = place_program(phone, arguments.program or f"{HOME}/benchmark_model", "benchmark_model")
    phone.push(converted, f"{FOLDER}/model.tflite")
    phone.push(here / "input.bin", f"{FOLDER}/input.bin")
    cool_down(phone, arguments)
    words = {
        "graph": f"{FOLDER}/model.tflite",
        "input_layer": "images",
        "input_layer_shape": ",".join(map(str, taken.shape)),
        "input_layer_value_files": f"images:{FOLDER}/input.bin",
        "output_filepath": f"{FOLDER}/output.bin",
        "num_runs": str(arguments.runs),
        "min_secs": "0",
        "num_threads": str(arguments.threads),
    } | ({} if arguments.provider == "cpu" else {f"use_{arguments.provider}": "true"})
    printed = launch(phone, arguments, timer, *(f"--{name}={value}" for name, value in words.items()))
    if "will not be executed by the delegate" in printed:
        fail(f"the delegate {arguments.provider} runs no operator of this network: use --provider cpu")
    pulled = phone.pull(f"{FOLDER}/output.bin", here / "output.bin")
    kind = onnx.load(arguments.model, load_external_data=False).graph.output[0].type.tensor_type
    shape = [dimension.dim_value for dimension in kind.shape.dim]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if len(pulled) != math.prod(shape) * dtype.itemsize:
        fail(f"the .tflite model gives {len(pulled)} bytes, but the ONNX model {dtype} of shape {shape}")
    return np.frombuffer(pulled, dtype).reshape(shape), [benchmark_model_time(printed)]


TOOLS = {"onnxruntime": measure_onnxruntime, "litert": measure_litert}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", type=Path, help="ONNX file with fixed shapes")
    made.add_argument("input", type=Path, help="NumPy file with the input")
    made.add_argument("output", type=Path, help="NumPy file to write the output to")
    made.add_argument(
        "--tool", choices=TOOLS, default="onnxruntime", help="runtime on the phone (default: %(default)s)"
    )
    made.add_argument("--serial", default=os.environ.get("ANDROID_SERIAL"), help="phone, if adb sees several")
    made.add_argument("--program", help="benchmark program: a place on the phone, or a file of this machine to push")
    made.add_argument("--runner", default=f"{HOME}/onnx_test_runner", help="onnx_test_runner, likewise")
    made.add_argument("--provider", default="cpu", help="execution provider such as xnnpack, or delegate such as gpu")
    made.add_argument("--arguments", type=shlex.split, default=[], help="more words for the programs on the phone")
    made.add_argument("--convert", help="program that makes a .tflite file of an ONNX file, for --tool litert")
    made.add_argument("--nhwc", action="store_true", help="the .tflite model takes channels last")
    made.add_argument("--threads", type=int, default=1, help="threads of the runtime (default: 1)")
    made.add_argument("--cores", help="hexadecimal mask of the cores to run on, for taskset, such as f0")
    made.add_argument("--runs", type=int, default=50, help="timed passes (default: 50)")
    made.add_argument("--cool-down", type=float, default=0.0, help="seconds to wait before the timing (default: 0)")
    made.add_argument("--max-temperature", type=float, help="time only below this temperature in °C")
    made.add_argument("--thermal-zone", help="type of the thermal zone to read (default: the battery)")
    made.add_argument("--max-wait", type=float, default=600.0, help="seconds to wait for that (default: 600)")
    return made


def main() -> None:
    if len(sys.argv) == 1:  # to be called by mixnas
        parser().print_help()
        return
    arguments = parser().parse_args()
    if arguments.runs < 1 or arguments.threads < 1 or arguments.cool_down < 0 or arguments.max_wait <= 0:
        fail("--runs, --threads and --max-wait must be above 0, and --cool-down must not be negative")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    import numpy as np

    phone = choose_phone(arguments.serial)
    try:
        phone.script(f"rm -rf {FOLDER} && mkdir {FOLDER}", "mkdir")
        with tempfile.TemporaryDirectory() as here:
            output, times_ms = TOOLS[arguments.tool](phone, arguments, Path(here))
    finally:
        subprocess.run(
            ["adb", "-s", phone.serial, "shell", f"rm -rf {FOLDER}"], stdin=subprocess.DEVNULL, capture_output=True
        )
    np.save(arguments.output, output)
    print(json.dumps({"latency_ms": times_ms}))


if __name__ == "__main__":
    main()
