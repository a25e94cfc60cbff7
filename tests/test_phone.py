"""`examples/phone.py` against an `adb` that plays a phone: a folder, a real shell, and programs that run the model.

The texts that its programs print follow the real ones: adb 29.0.6, ONNX Runtime's `performance_runner.cc`,
`TestResultStat.cc` and README of `onnx_test_runner`, LiteRT's `benchmark_model.cc`, Android's `BatteryService`.
"""

from __future__ import annotations

import copy
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nas.errors import TrialFailure
from nas.scoring.latency import LatencyConfig, prepare_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

EXAMPLE = Path(__file__).parents[1] / "examples" / "phone.py"
HOME = "/data/local/tmp"
ONE = "List of devices attached\nR58M123ABC\tdevice\n\n"

ADB = """\
import os, shutil, subprocess, sys
root, words = os.environ["PHONE"], sys.argv[1:]
here = lambda text: text.replace("/data/local", root + "/data/local").replace("/sys/class", root + "/sys/class")
if words == ["devices"]:
    sys.exit(print(open(root + "/devices").read(), end=""))
assert words[:2] == ["-s", "R58M123ABC"], words
if words[2] == "push":
    shutil.copyfile(words[3], here(words[4]))
    print(f"{words[3]}: 1 file pushed, 0 skipped. 37.3 MB/s ({os.path.getsize(words[3])} bytes in 0.273s)")
elif words[2] == "pull":
    if not os.path.isfile(here(words[3])):
        sys.exit(f"adb: error: failed to stat remote object '{words[3]}': No such file or directory")
    shutil.copyfile(here(words[3]), words[4])
else:
    # a real phone joins the words with spaces and gives the line to its shell
    path = root + "/system/bin:" + os.environ["PATH"]
    sys.exit(subprocess.run(["sh", "-c", here(" ".join(words[3:]))], env={**os.environ, "PATH": path}).returncode)
"""

SESSION = """\
import os, sys, time
import numpy as np
import onnx, onnxruntime
from onnx import numpy_helper

def session(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

def read(file):
    return numpy_helper.to_array(onnx.TensorProto.FromString(open(file, "rb").read()))

def value(flag):
    return sys.argv[sys.argv.index(flag) + 1]

def timed(run, passes):
    costs = []
    for _ in range(passes):
        start = time.perf_counter()
        run()
        costs.append(time.perf_counter() - start)
    return costs

WRONG = float(os.environ.get("WRONG", 1))
with open(os.environ["PHONE"] + "/log", "a") as log:
    print(os.path.basename(sys.argv[0]), len(os.sched_getaffinity(0)), *sys.argv[1:], file=log)
"""

PERF_TEST = """
if os.environ.get("SLOW"):
    time.sleep(60)
model, result = sys.argv[-2:]
assert value("-m") == "times" and value("-e") == "cpu"
folder = os.path.dirname(model)
(data,) = [name for name in os.listdir(folder) if os.path.isdir(f"{folder}/{name}")]
ready = session(model)
feed = {ready.get_inputs()[0].name: read(f"{folder}/{data}/input_0.pb")}
costs = timed(lambda: ready.run(None, feed), int(value("-r")))
columns = os.environ.get("COLUMNS_OF", "{model},{cost:.6g},19812352,97,{run}")
with open(result, "a") as file:
    for run, cost in enumerate(costs):
        print(columns.format(model=os.path.basename(folder), cost=cost, run=run), file=file)
print(f"Session creation time cost: 0.0127918 s\\nTotal inference requests: {len(costs)}")
print(f"Average inference time cost: {1e3 * sum(costs) / len(costs)} ms")
"""

TEST_RUNNER = """
if os.environ.get("OLD"):
    print("onnx_test_runner: invalid option -- 'I'", file=sys.stderr)
    print("onnx_test_runner [options...] <data_root>\\nOptions:\\n\\nonnxruntime version: 1.18.0")
    sys.exit(255)
assert "-I" in sys.argv
ready = session(sys.argv[-1] + "/model.onnx")
data = sys.argv[-1] + "/test_data_set_0"
(output,) = ready.run(None, {ready.get_inputs()[0].name: read(data + "/input_0.pb")})
saved = numpy_helper.from_array((WRONG * output).astype(output.dtype), ready.get_outputs()[0].name)
open(data + "/actual_output_0.pb", "wb").write(saved.SerializeToString())
print("result: \\n\\tModels: 1\\n\\tTotal test cases: 1\\n\\t\\tSucceeded: 1\\n\\t\\tFailed: 0\\nFailed Test Cases:")
"""

BENCHMARK_MODEL = """
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
shape = [int(side) for side in flags["input_layer_shape"].split(",")]
name, _, file = flags["input_layer_value_files"].partition(":")
assert name == flags["input_layer"]
ready = session(flags["graph"])
given = np.frombuffer(open(file, "rb").read(), np.float32).reshape(shape)
feed = {ready.get_inputs()[0].name: given.transpose(0, 3, 1, 2) if os.environ.get("NHWC") else given}
costs = [1e6 * cost for cost in timed(lambda: ready.run(None, feed), int(flags["num_runs"]))]
(output,) = ready.run(None, feed)
open(flags["output_filepath"], "wb").write((WRONG * output).astype(np.float32).tobytes())
if os.environ.get("SILENT"):
    sys.exit("ERROR: Failed to apply GPU delegate.")
print("INFO: STARTING!\\nINFO: Log parameter values verbosely: [0]")
if "use_nnapi" in flags:
    print("INFO: Though NNAPI delegate is explicitly applied, the model graph will not be executed by the delegate.")
print("INFO: The input model file size (MB): 0.004448\\nINFO: Initialized session in 0.855ms.")
print("INFO: Running benchmark for at least 1 iterations and at least 0.5 seconds")
print("INFO: count=15 first=49060 curr=33682 min=32825 max=49060 avg=34825.1 std=3930 p5=1 median=2 p95=3\\n")
print("INFO: Running benchmark for at least 50 iterations and at least 0 seconds")
print(os.environ.get("COUNT") or f"INFO: count={len(costs)} first=5 curr=5 min=5 max=5 avg={np.mean(costs):g} std=1 "
      f"p5=5 median={int(np.median(costs)) + 1} p95=5")
print("\\nINFO: Inference timings in us: Init: 855, First inference: 49060, Warmup (avg): 34825.1")
"""

DUMPSYS = """\
import os, pathlib
file = pathlib.Path(os.environ["PHONE"]) / "temperatures"
now, *later = file.read_text().split()
file.write_text(" ".join(later or [now]))
print(f"Current Battery Service state:\\n  AC powered: false\\n  USB powered: true\\n  level: 84\\n  scale: 100\\n"
      f"  voltage: 4063\\n  temperature: {now}\\n  technology: Li-ion")
"""


def install(file: Path, text: str, options: str = "") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!{sys.executable}{options}\n{text}")
    file.chmod(0o755)


@pytest.fixture
def phone(tmp_path, monkeypatch):
    """The folder that plays the phone, whose `adb` is on the PATH."""
    root = tmp_path / "phone"
    install(tmp_path / "bin" / "adb", ADB, " -SE")
    install(root / "system" / "bin" / "dumpsys", DUMPSYS, " -SE")
    for name, text in (("onnxruntime_perf_test", PERF_TEST), ("onnx_test_runner", TEST_RUNNER)):
        install(root / HOME[1:] / name, SESSION + text)
    install(root / HOME[1:] / "benchmark_model", SESSION + BENCHMARK_MODEL)
    (root / "devices").write_text(ONE)
    (root / "temperatures").write_text("326")
    for number, (kind, milli) in enumerate((("battery", "31000"), ("soc_max", "54300"))):
        zone = root / "sys" / "class" / "thermal" / f"thermal_zone{number}"
        zone.mkdir(parents=True)
        (zone / "type").write_text(kind + "\n")
        (zone / "temp").write_text(milli + "\n")
    monkeypatch.setenv("PHONE", str(root))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    return root


@pytest.fixture
def files(tmp_path):
    """The files of a call: a small model, an input and the place of the output; and the expected output."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("Mul", ["images", "images"], ["square"]),
        helper.make_node("ReduceMean", ["square", "axes"], ["output"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", kind, [1, 3, 8, 6])],
        [helper.make_tensor_value_info("output", kind, [1, 3])],
        [onnx.numpy_helper.from_array(np.array([2, 3]), "axes")],
    )
    folder = tmp_path / "files of a call"
    folder.mkdir()
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "model.onnx"
    )
    images = np.random.default_rng(0).standard_normal((1, 3, 8, 6), dtype=np.float32)
    np.save(folder / "input.npy", images)
    return [folder / "model.onnx", folder / "input.npy", folder / "output.npy"], (images**2).mean((2, 3))


def call(files, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, EXAMPLE, *files[0], *options], capture_output=True, text=True, timeout=60)


def converter(tmp_path: Path) -> str:
    """The options for LiteRT with a converter that copies the ONNX file, which the phone's program understands."""
    program = tmp_path / "convert it"
    install(program, "import shutil, sys\nshutil.copyfile(*sys.argv[1:])\n", " -SE")
    return shlex.quote(str(program))


def leftovers(phone: Path) -> set[str]:
    programs = {"onnxruntime_perf_test", "onnx_test_runner", "benchmark_model"}
    return {file.name for file in (phone / HOME[1:]).iterdir()} - programs


@pytest.mark.parametrize(
    "columns", ["{model},0.004{run},19812352,97,{run}", "{model},1e-9,0.004{run},19812352,97,{run}"]
)
def test_the_times_and_the_output_come_from_the_phone(phone, files, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS_OF", columns)
    done = call(files, "--runs", "7", "--threads", "2", "--cores", "1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["latency_ms"] == pytest.approx([4.0, 4.1, 4.2, 4.3, 4.4, 4.5, 4.6])
    np.testing.assert_allclose(np.load(files[0][2]), files[1], rtol=1e-5)
    _, timer = (phone / "log").read_text().splitlines()
    assert timer.startswith("onnxruntime_perf_test 1 ")  # on one core
    assert "-x 2" in timer
    assert leftovers(phone) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "time_ms"),
    [
        ("INFO: count=50 first=32891 curr=33978 min=32641 max=34005 avg=33209.4 std=450 p5=1 median=33100 p95=2", 33.1),
        ("count=15 first=66753 curr=66800 min=66699 max=66838 avg=66767.6 std=39", 66.7676),
        ("INFO: count=50 first=328140 curr=309932 min=309932 max=328140 avg=1.49712e+06 std=9104", 1497.12),
        ("INFO: count=50 curr=5(all same) p5=5 median=5 p95=5", 0.005),
        ("count=3 curr=5(all same)", 0.005),
    ],
)
def test_litert_prints_the_median_or_the_mean(phone, files, tmp_path, count, time_ms, monkeypatch):
    monkeypatch.setenv("COUNT", count)
    done = call(files, "--tool", "litert", "--convert", converter(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"latency_ms": [pytest.approx(time_ms)]}
    np.testing.assert_allclose(np.load(files[0][2]), files[1], rtol=1e-5)


@pytest.mark.slow
def test_litert_with_channels_last(phone, files, tmp_path, monkeypatch):
    monkeypatch.setenv("NHWC", "1")
    done = call(files, "--tool", "litert", "--convert", converter(tmp_path), "--nhwc", "--provider", "gpu")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(files[0][2]), files[1], rtol=1e-5)
    assert "--input_layer_shape=1,8,6,3" in (phone / "log").read_text()
    assert "--use_gpu=true" in (phone / "log").read_text()
    assert leftovers(phone) == set()


TWO = ONE.rstrip("\n") + "\nemulator-5554\toffline\n\n"


EARLY = [
    ([], {"devices": "List of devices attached\n\n"}, "adb sees no phone: connect one"),
    ([], {"devices": TWO}, "choose one by --serial (R58M123ABC (device), emulator-5554 (offline))"),
    (["--serial", "emulator-5554"], {"devices": TWO}, "emulator-5554 is not ready (offline)"),
    ([], {"devices": ONE.replace("\tdevice", "\tunauthorized")}, "is not ready (unauthorized): unlock it"),
    (["--serial", "X"], {}, "adb does not see the phone X: it sees R58M123ABC (device)"),
    (["--runs", "0"], {}, "must be above 0"),
    (["--program", "/data/local/tmp/gone"], {}, "the phone has no program /data/local/tmp/gone: push it there"),
]
LITERT = ["--tool", "litert"]
LATE = [
    (LITERT, {}, "needs --convert PROGRAM"),
    ([*LITERT, "--convert", "no-such-program"], {}, "no-such-program is not on this machine's PATH"),
    (["--max-temperature", "32", "--max-wait", "0.2"], {}, "still has 32.6 °C after 0.2 s: cool it, or raise"),
    (["--max-temperature", "40", "--thermal-zone", "soc_max", "--max-wait", "0.2"], {}, "still has 54.3 °C"),
    (["--max-temperature", "40", "--thermal-zone", "x"], {}, "no readable thermal zone x: it has battery, soc_max"),
    ([], {"OLD": "1"}, "onnx_test_runner on the phone ended with status 255: onnx_test_runner: invalid option -- 'I'"),
    ([], {"COLUMNS_OF": "{cost}"}, "wrote 0 times that can be read, not 50"),
    ([], {"COLUMNS_OF": "small,0,1,2,{run}"}, "wrote 50 times that cannot be: 0 to 0 ms"),
    (LITERT, {"COUNT": "killed"}, "printed no times of a warm-up and of passes"),
    ([*LITERT, "--provider", "nnapi"], {}, "the delegate nnapi runs no operator of this network"),
    ([*LITERT, "--provider", "gpu"], {"SILENT": "1"}, "phone ended with status 1: ERROR: Failed to apply GPU"),
]


@pytest.mark.parametrize(
    ("options", "changes", "words"), [*EARLY, *(pytest.param(*case, marks=pytest.mark.slow) for case in LATE)]
)
def test_a_problem_is_told_in_one_line(phone, files, tmp_path, options, changes, words, monkeypatch):
    for name, value in changes.items():
        if name == "devices":
            (phone / name).write_text(value)
        else:
            monkeypatch.setenv(name, value)
    if "litert" in options and "--convert" not in f"{options} {words}":
        options = [*options, "--convert", converter(tmp_path)]
    done = call(files, *options)
    assert done.returncode == 1
    assert words in done.stderr[:200], "mixnas shows no more"
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout
    assert not files[0][2].exists()
    assert leftovers(phone) == set()


def test_without_adb(files, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = call(files)
    assert done.returncode == 1
    assert done.stderr == "adb is not on this machine's PATH: install it (Android platform tools)\n"


@pytest.mark.slow
def test_words_reach_the_phone_as_they_are(phone, files):
    """A name that a shell would run, and a program of this machine with such a name."""
    name = "it's; $(touch pwned) `touch pwned` & *"
    (phone / HOME[1:] / "onnxruntime_perf_test").rename(phone / HOME[1:] / name)
    local = phone / "a b $(touch pwned)"
    (phone / HOME[1:] / "onnx_test_runner").rename(local)
    done = call(files, "--program", f"{HOME}/{name}", "--runner", str(local), "--arguments=-z '; touch pwned #'")
    assert done.returncode == 0, done.stderr
    assert (phone / "log").read_text().count(" -z ; touch pwned # ") == 2
    assert not [file for place in (Path.cwd(), phone, phone / HOME[1:]) for file in place.glob("**/pwned")]


@pytest.mark.slow
def test_it_waits_until_the_phone_is_cool(phone, files):
    (phone / "temperatures").write_text("401 372 349 300")
    done = call(files, "--max-temperature", "35", "--max-wait", "5")
    assert done.returncode == 0, done.stderr
    assert (phone / "temperatures").read_text() == "300", "the third reading was cool enough"


@pytest.mark.slow
def test_a_call_that_is_terminated_leaves_nothing_on_the_phone(phone, files, monkeypatch):
    monkeypatch.setenv("SLOW", "1")
    process = subprocess.Popen([sys.executable, EXAMPLE, *files[0]], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (phone / "log").exists() or "perf_test" not in (phone / "log").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    assert leftovers(phone) == {"mixnas-phone"}
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[1] == b"terminated\n"
    assert leftovers(phone) == set()


NETWORK = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["onnxruntime", "litert"])
def test_mixnas_measures_on_the_phone_and_finds_a_wrong_output(phone, tmp_path, tool, monkeypatch):
    command = shlex.join([sys.executable, str(EXAMPLE), "--tool", tool, "--convert", converter(tmp_path)])
    command += " {model} {input} {output} --runs 5"
    config = LatencyConfig(runtime="command", command=command)
    with torch.no_grad():
        network = copy.deepcopy(NETWORK).eval()
        network(torch.zeros(1, 3, 16, 16))
    prepared = prepare_model(network, (3, 16, 16), config)
    assert prepared.output().shape == (1, 5)
    assert prepared.deviation < 1e-5
    assert prepared.time_block(1)[0] > 0
    monkeypatch.setenv("WRONG", "1.01")
    with pytest.raises(TrialFailure, match=r"command in fp32 differs from eager by 0\.01") as caught:
        prepare_model(network, (3, 16, 16), config)
    assert caught.value.reason == "wrong_output"
    assert leftovers(phone) == set()
