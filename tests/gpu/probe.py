"""A process that opens the device, so that the parent of all processes uses none of its memory."""

from __future__ import annotations

from typing import Any

import devices
import processes


def _work(request: dict[str, Any]) -> dict[str, Any]:
    device = devices.open_device(request["device"])
    return {"described": device.describe(), "free_bytes": device.free_bytes(), "simulated": device.simulated}


if __name__ == "__main__":
    processes.answer(_work)
