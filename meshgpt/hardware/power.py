"""Power and price of devices, for energy and cost: assumptions that a reader may replace; each says its source.

Power is the maker's rating of one JAX device (thermal design power; of TPU v3 and v4 the measured maximum, which is all
that is published of v4; a device of TPU v2, v3 and v7 is half a chip): what training draws is near it on a busy device
and less on an idle one. Host, network and cooling are not in it.
"""

from __future__ import annotations

import dataclasses
import re

from meshgpt.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """A kind of accelerator.

    name: as a user types it (`--hardware 8xA100`). kind: JAX's `device_kind` of the usual variant. pattern: of all
    variants that share the figures. watts: rated power of one JAX device; None where the maker gives none. dollars: per
    device and hour, a round figure for renting one on demand in 2026, given only as a starting point; None: unknown.
    """

    name: str
    kind: str
    pattern: str
    watts: float | None
    source: str
    dollars: float | None


_SHEET = "NVIDIA data sheet"
_LESSONS = "Jouppi et al. 2021 (Ten Lessons), table 1"
_PAGE = "Google Cloud's page of the TPU, measured maximum"

# All watts were compared with published tables. Dollars: of TPU v4 and later Google's list prices, as GKE's autoscaler
# has them; of A100, H100, H200 and B200 within what smaller clouds listed in the autumn of 2026 (large ones ask up to
# three times as much); all others are from memory and not confirmed.
DEVICES = (
    Device(name="V100", kind="Tesla V100-SXM2-16GB", pattern=r"Tesla V100-SXM.*", watts=300, source=_SHEET, dollars=1),
    Device(name="T4", kind="Tesla T4", pattern=r"Tesla T4", watts=70, source=_SHEET, dollars=0.4),
    Device(name="A100", kind="NVIDIA A100-SXM4-80GB", pattern=r".*A100-SXM4.*", watts=400, source=_SHEET, dollars=2),
    Device(name="A10", kind="NVIDIA A10", pattern=r"NVIDIA A10", watts=150, source=_SHEET, dollars=0.8),
    Device(name="L4", kind="NVIDIA L4", pattern=r"NVIDIA L4", watts=72, source=_SHEET, dollars=0.7),
    Device(name="L40S", kind="NVIDIA L40S", pattern=r"NVIDIA L40S", watts=350, source=_SHEET, dollars=1.5),
    Device(name="H100", kind="NVIDIA H100 80GB HBM3", pattern=r"NVIDIA H100 80GB HBM3", watts=700, source=_SHEET,
           dollars=3),
    Device(name="H200", kind="NVIDIA H200", pattern=r"NVIDIA H200", watts=700, source=_SHEET, dollars=4.5),
    Device(name="B200", kind="NVIDIA B200", pattern=r"NVIDIA B200", watts=1000, source=_SHEET, dollars=6),
    Device(name="3060", kind="NVIDIA GeForce RTX 3060", pattern=r"NVIDIA GeForce RTX 3060", watts=170, source=_SHEET,
           dollars=None),
    Device(name="3090", kind="NVIDIA GeForce RTX 3090", pattern=r"NVIDIA GeForce RTX 3090", watts=350, source=_SHEET,
           dollars=0.3),
    Device(name="4090", kind="NVIDIA GeForce RTX 4090", pattern=r"NVIDIA GeForce RTX 4090", watts=450, source=_SHEET,
           dollars=0.5),
    Device(name="TPUv2", kind="TPU v2", pattern=r"TPU v2", watts=280 / 2, source=_LESSONS, dollars=0.55),
    Device(name="TPUv3", kind="TPU v3", pattern=r"TPU v3", watts=262 / 2, source=_PAGE, dollars=1.1),
    Device(name="TPUv4", kind="TPU v4", pattern=r"TPU v4", watts=192, source=_PAGE, dollars=3.22),
    Device(name="TPUv5e", kind="TPU v5 lite", pattern=r"TPU v5 lite|TPU v5e", watts=None, source="", dollars=1.2),
    Device(name="TPUv5p", kind="TPU v5", pattern=r"TPU v5|TPU v5p", watts=None, source="", dollars=4.2),
    Device(name="TPUv6e", kind="TPU v6 lite", pattern=r"TPU v6 lite|TPU v6e", watts=None, source="", dollars=2.7),
)  # fmt: skip


def by_kind(device_kind: str) -> Device | None:
    """The device of JAX's `device_kind`; None where it is not known."""
    return next((device for device in DEVICES if re.fullmatch(device.pattern, device_kind)), None)


def parse(text: str) -> tuple[int, Device]:
    """(number, device) of `8xA100`, or of `A100`, which is one.

    Raises:
      UserError: naming the devices that are known.
    """
    found = re.fullmatch(r"(?:(\d{1,6})\s*x\s*)?([A-Za-z0-9]+)", text.strip())
    device = found and next((d for d in DEVICES if d.name.lower() == found[2].lower()), None)
    if not found or device is None or found[1] == "0":
        known = ", ".join(device.name for device in DEVICES)
        raise UserError(f"--hardware {text!r}: give a number and a device, as 8xA100; known are {known}")
    return int(found[1] or 1), device
