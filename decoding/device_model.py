"""The name by which configs know `decoding.machine.modelled`."""

from decoding.machine.modelled import modelled as modelled
