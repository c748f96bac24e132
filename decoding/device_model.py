"""The name by which configs know `decoding.modelled`."""

from decoding.modelled import modelled as modelled
