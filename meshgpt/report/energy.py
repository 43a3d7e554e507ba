"""Energy and emissions of a run: power times hours times the carbon in a kilowatt-hour. Factors name their sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from meshgpt.errors import UserError
from meshgpt.hardware import power
from meshgpt.settings import settings

WORLD_GRID = 0.480
WORLD_GRID_SOURCE = "world average of 2023, Ember, Global Electricity Review 2024"


@settings("energy")
class Assumptions:
    """What energy and emissions are computed with."""

    watts: float | None = None
    """Power that one device draws on average, in watts; None takes the maker's rating, where there is one."""
    pue: float = 1.0
    """Power usage effectiveness: watts that the building draws for each watt of the devices; 1.0 leaves the building
    out."""
    kg_per_kwh: float = WORLD_GRID
    """Carbon intensity of the grid, in kg of CO2 equivalent per kWh."""

    def __post_init__(self) -> None:
        for name, low in (("watts", 0.0), ("pue", 1.0), ("kg_per_kwh", 0.0)):
            value = getattr(self, name)
            if value is not None and not low <= value < float("inf"):
                raise UserError(f"--energy.{name.replace('_', '-')} {value}: give a number of at least {low:g}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Energy:
    """kwh and kg are None where the power of a device is not known; `basis` says how they came about, in sentences."""

    kwh: float | None
    kg: float | None
    basis: list[str]


def energy(device_hours: Mapping[str, float], assumed: Assumptions) -> Energy:
    """Energy of a run that took `device_hours` (hours times devices, by JAX's `device_kind`)."""
    if not device_hours:
        return Energy(kwh=None, kg=None, basis=["No hours are recorded for this run (it has no sessions.json)."])
    kwh, basis = 0.0, []
    for kind, hours in device_hours.items():
        watts, source = _power(kind, assumed)
        if watts is None:
            text = f"The power of {kind!r} is not known: give what one draws on average with --energy.watts."
            return Energy(kwh=None, kg=None, basis=[text])
        kwh += watts / 1000 * hours * assumed.pue
        basis.append(f"{hours:.4g} device-hours of {kind} at {watts:g} W ({source}).")
    source = WORLD_GRID_SOURCE if assumed.kg_per_kwh == WORLD_GRID else "given with --energy.kg-per-kwh"
    basis.append(f"{assumed.kg_per_kwh:g} kg CO2 eq per kWh ({source}).")
    basis.append(
        f"Power usage effectiveness {assumed.pue:g}"
        + (": host, network and building are left out." if assumed.pue == 1.0 else ", given with --energy.pue.")
    )
    return Energy(kwh=kwh, kg=kwh * assumed.kg_per_kwh, basis=basis)


def _power(kind: str, assumed: Assumptions) -> tuple[float | None, str]:
    if assumed.watts is not None:
        return assumed.watts, "given with --energy.watts"
    device = power.by_kind(kind)
    return (device.watts, device.source) if device and device.watts is not None else (None, "")
