"""The scalings of a layer: floats to read and assign, each mirrored in the 0-d tensor that the ops take.

A Python float handed to an op costs a compile per value and freezes in a CUDA graph; a buffer does neither.
"""

import torch

from ..ops.wide import wide_dtype


def scaling_buffer(adapter_name):
    """The name of the buffer of an adapter's scaling."""
    return "scaling_" + adapter_name


class Scaling(dict):
    """Adapter name to scaling; an assignment reaches the buffer as well.

    ``buffers`` is the layer's own buffer dict; ``zeros`` are the names of the adapters that are scaled to nothing.
    """

    def __init__(self, buffers, values=()):
        super().__init__(values)
        self.buffers = buffers
        self.zeros = {name for name, value in self.items() if value == 0.0}

    def __reduce__(self):
        return Scaling, (self.buffers, dict(self))

    def __setitem__(self, name, value):
        self._note(name, value)
        self._fill(name)

    def start(self, name, value, weight):
        """The scaling of an adapter that has none yet, and its buffer beside ``weight``."""
        self._note(name, value)
        self.buffers[scaling_buffer(name)] = _buffer(self[name], wide_dtype(weight), weight.device)

    def _note(self, name, value):
        super().__setitem__(name, float(value))
        (self.zeros.discard if self[name] else self.zeros.add)(name)

    def update(self, *args, **kwargs):
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def refill(self, buffers):
        """After the buffers were moved or cast: each is float32 again, or float64, and holds its value."""
        self.buffers = buffers
        for name in self:
            self._fill(name)

    def _fill(self, name):
        key = scaling_buffer(name)
        buffer = self.buffers[key]
        usable = buffer.dtype in (torch.float32, torch.float64) and not buffer.is_inference()
        if usable and buffer.device.type != "cpu":
            self.buffers[key] = overwritten(buffer, self[name])
        else:
            self.buffers[key] = _buffer(self[name], wide_dtype(buffer), buffer.device)


def overwritten(buffer, value):
    """Another tensor over the same memory, which graphs captured on a GPU read, with ``value`` in it.

    ``buffer`` itself moves elsewhere with the value that it had: a backward may have saved it.
    """
    with torch.inference_mode(False):
        same = buffer.data
        buffer.data = same.clone()
        return same.fill_(value)


def _buffer(value, dtype, device):
    """A 0-d tensor that may be written to in any mode, as one made in inference mode may not."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return torch.full((), value, dtype=dtype, device=device)
    return torch.full((), value, dtype=dtype, device=device)
