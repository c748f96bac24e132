"""The names by which configs know `decoding.machine.joules` and `decoding.machine.meter`."""

from decoding.machine.joules import measure_joules as measure_joules
from decoding.machine.meter import EnergyMeter as EnergyMeter
