"""The reference network and its stored latency, by which all measurements are normalised.

The speed of a machine drifts by tens of percent because of clocks, neighbours on the same silicon and memory. If a
network and the reference are timed in turns, the latency of the network is the ratio of the two times, multiplied by
the stored latency of the reference. The drift cancels as far as it affects both alike. The latency of the reference is
measured and stored once for a machine, runtime and conditions.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import nn

from ...errors import NasError
from ...foreign_files import read_json
from ...machine.description import machine_name
from ...machine.devices import seeded
from .config import LatencyConfig
from .runtimes import Prepared, prepare, random_images

VERSION = 1
"""Version of the reference network. The network never changes without a new version, because all latencies depend on
it."""
INPUT_SIZE = (3, 128, 128)


class ReferenceNetwork(nn.Module):
    """Small network with the operations of searched networks.

    It has dense, pointwise and depthwise convolution, attention and MLPs, with about 0.2 G multiply-adds for an image
    of `INPUT_SIZE`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 48, 3, 2, 1), nn.ReLU())
        self.local = nn.ModuleList(_LocalBlock(48) for _ in range(3))
        self.down = nn.Conv2d(48, 128, 3, 2, 1)
        self.tokens = nn.ModuleList(_TokenBlock(128) for _ in range(3))
        self.head = nn.Linear(128, 1000)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Maps images to 1000 numbers each."""
        x_BCHW = self.stem(x_BCHW)
        for block in self.local:
            x_BCHW = x_BCHW + block(x_BCHW)
        x_BNC = self.down(x_BCHW).flatten(2).transpose(1, 2)
        for block in self.tokens:
            x_BNC = block(x_BNC)
        output: torch.Tensor = self.head(x_BNC.mean(1))
        return output


class _LocalBlock(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Conv2d(width, width, 3, 1, 1, groups=width),
            nn.Conv2d(width, 4 * width, 1),
            nn.GELU(),
            nn.Conv2d(4 * width, width, 1),
        )


class _TokenBlock(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x_BNC: torch.Tensor) -> torch.Tensor:
        B, N, C = x_BNC.shape
        q_BHND, k_BHND, v_BHND = (
            self.qkv(self.norm1(x_BNC)).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        weights_BHNN = (q_BHND @ k_BHND.transpose(-2, -1) * (C // self.heads) ** -0.5).softmax(-1)
        x_BNC = x_BNC + self.proj((weights_BHNN @ v_BHND).transpose(1, 2).reshape(B, N, C))
        output: torch.Tensor = x_BNC + self.fc2(F.gelu(self.fc1(self.norm2(x_BNC))))
        return output


def prepared_reference(config: LatencyConfig) -> Prepared:
    """Returns the reference network under the candidates' conditions, with the same weights in every process."""
    plain = LatencyConfig()
    effort = {name: getattr(plain, name) for name in ("target", "max_seconds", "warmup_seconds", "block_ms", "seed")}
    return _prepared(replace(config, **effort))


@lru_cache(maxsize=4)
def _prepared(config: LatencyConfig) -> Prepared:
    with seeded(0):
        network = ReferenceNetwork().eval()
    return prepare(network, random_images(INPUT_SIZE, config), config)


def stored_reference_ms(config: LatencyConfig) -> float | None:
    """Returns the stored latency of the reference for this machine and these conditions, or None."""
    entry = _read().get(_key(config))
    return None if entry is None else float(entry["ms"])


def store_reference_ms(config: LatencyConfig, ms: float) -> None:
    """Stores the latency of the reference for this machine and these conditions.

    Raises:
        NasError: if the file cannot be written.
    """
    path = references_file()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock")):
            entries = _read() | {_key(config): {"ms": ms, "fixed": datetime.now(UTC).isoformat(timespec="seconds")}}
            temporary.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
            temporary.replace(path)
    except OSError as error:
        raise NasError(
            f"cannot write {path}: {error.strerror or error}; set XDG_CACHE_HOME to a writable folder"
        ) from None


def forget_references() -> None:
    """Deletes the stored latencies of the reference for all conditions, so that they are measured again.

    Latencies from before and after cannot be compared.
    """
    with contextlib.suppress(FileNotFoundError):
        references_file().unlink()


def references_file() -> Path:
    """Returns the file with reference latencies, in `$XDG_CACHE_HOME/mixnas` or `~/.cache/mixnas`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mixnas" / "reference_latencies.json"


def _read() -> dict[str, dict[str, Any]]:
    """Returns the valid entries of the file.

    A missing or damaged file counts as empty, so that its latencies are measured again.
    """
    with contextlib.suppress(NasError):
        data = read_json(references_file(), "reference latencies", dict, NasError)
        return {
            key: entry
            for key, entry in data.items()
            if isinstance(entry, dict) and isinstance(ms := entry.get("ms"), int | float) and 0 < ms < 1e6
        }
    return {}


def _key(config: LatencyConfig) -> str:
    # conditions that a later release adds stand at the end, so that the names of stored references stay as they are
    known = {"runtime", "command", "dtype", "batch_size", "threads", "channels_last", "folded"}
    further = {name: value for name, value in config.conditions.items() if name not in known}
    parts = (
        f"reference {VERSION}",
        machine_name(config.device),
        f"torch {torch.__version__}",
        config.device,
        config.runtime,
        config.command or "",
        config.dtype,
        f"batch {config.batch_size}",
        f"{config.threads or torch.get_num_threads()} threads",
        "channels_last" if config.channels_last else "contiguous",
        *(f"{name} {value}" for name, value in further.items() if value is not None),
    )
    return ", ".join(part for part in parts if part)
