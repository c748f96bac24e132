"""The names by which configs know `decoding.joules` and `decoding.meter`."""

from decoding.joules import measure_joules as measure_joules
from decoding.meter import EnergyMeter as EnergyMeter
