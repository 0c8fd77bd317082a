"""What the two services that compute do with torch before they serve."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from afd.config import ComputeSettings
from afd.errors import ConfigError

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def prepare_torch(settings: ComputeSettings) -> tuple[torch.dtype, torch.device]:
    """Sets the number of threads; returns the dtype and device asked for. ConfigError without that device."""
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"AFD_DEVICE={settings.device}: this machine has no such GPU; use AFD_DEVICE=cpu")
    return DTYPES[settings.dtype], device


def loading_progress(what: str) -> Callable[[int, int], None]:
    """Logs every tenth of the way."""

    def progress(done: int, total: int) -> None:
        if done * 10 // total > (done - 1) * 10 // total:
            log.info("loading %s: %d of %d layers", what, done, total)

    return progress
