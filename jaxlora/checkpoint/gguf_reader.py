"""GGUF files, read in half of the time. Apart, since only the first start on a machine needs the package `gguf`."""

import gguf
import numpy as np


class Reader(gguf.GGUFReader):
    """`gguf.GGUFReader` over a plain view of the file: it takes a vocabulary apart slice by slice, and a slice of a `numpy.memmap` costs
    more than what is read."""

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = mapped.view(np.ndarray)
