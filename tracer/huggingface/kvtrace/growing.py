"""A list of numbers that grows while a model runs."""

import torch

_LEAST = 1024


class GrowingTensor:
    """A tensor [n] that pieces are appended to. They are copied, to where the first of them was: small tensors that live as
    long as the run lie between those that come and go in it, and keep their memory from being used again."""

    def __init__(self):
        self._room = None
        self._count = 0

    def __len__(self):
        return self._count

    def append(self, piece):
        """`piece`: [n]."""
        end = self._count + len(piece)
        if self._room is None or end > len(self._room):
            with torch.inference_mode(False):  # so that it may be written to in any mode
                room = torch.empty(max(end, 2 * self._count, _LEAST), dtype=piece.dtype, device=piece.device)
                if self._room is not None:
                    room[: self._count] = self._room[: self._count]
            self._room = room
        self._room[self._count : end] = piece.detach()
        self._count = end

    def tensor(self, first=0):
        """What was appended, but for the first of it, on the CPU."""
        return self._room[first : self._count].cpu() if self._room is not None else torch.empty(0)

    def clear(self):
        self._room, self._count = None, 0
