"""Where packs run: in this process, or in one long-lived worker process per device. Both give the same bits."""

from __future__ import annotations

from fedsim.executors.fleet import Fleet, FleetExecutor
from fedsim.executors.pool import PoolExecutor
from fedsim.executors.serial import SerialExecutor

__all__ = ["Fleet", "FleetExecutor", "PoolExecutor", "SerialExecutor"]
