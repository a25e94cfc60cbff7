"""Default values that the library and the command line share.

This module imports nothing, so that `--help` can show the values without loading the library.
"""

DEVICE = "auto"
SEED = 0

# Objectives, sampler and length of a search
OBJECTIVES = ("latency", "accuracy")
SAMPLER = "surrogate"
TRIALS = 32
OPTIMIZE_TRIALS = 100
"""Trials of `optimize`, whose evaluations are the caller's own and often cheap."""

# Images
DATA = "digits"
MAX_IMAGES = 20_000

# Accuracy: the short training of a search
PROXY = "train"
PROXY_REPEATS = 1
EPOCHS = 4
TRAIN_BATCH_SIZE = 64

# Grafts: the tuning of what was assembled
GRAFT_PROXY = "train"
GRAFT_EPOCHS = 1
LIBRARY = "default"
GRAIN = "stage"
DISTIL_EPOCHS = 4
TUNE_EPOCHS = 4
TUNE_COUNT = 12

# Latency
RUNTIME = "eager"
DTYPE = "fp32"
BATCH_SIZE = 1
COMMAND_TIMEOUT = 120.0
LATENCY_TARGET = 0.01
"""Half-width of the 95 % interval, as a share of the latency."""
LATENCY_SECONDS = 3.0

# Processes that score
WORKERS = 1
ENGINE = "local"
ADDRESS = "auto"
GPUS_PER_TRIAL = 1.0
ONLY = "all"

# Calibrations and profiles
CALIBRATION_COUNT = 40
CALIBRATION_EPOCHS = 16
GRAFT_CALIBRATION_EPOCHS = 8
CALIBRATION_REPEATS = 12
PROFILE_INPUT_SIZE = 224
PROFILE_MINUTES = 10.0
