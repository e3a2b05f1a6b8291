"""Brings tensors from the model's device to the file while the model goes on."""

import collections
import threading

import torch

# Of tensors that wait in host memory to be written; one that is larger waits alone.
_WAITING_BYTES = 256 << 20


class Transfer:
    """A thread that does pieces of work, in order, on tensors that were copied to the host.

    On the device there is at most one layer's copy at a time: the next is made when the one before has left.
    """

    def __init__(self):
        self._streams = {}
        self._in_flight = None
        self._work = collections.deque()
        self._waiting = 0
        self._changed = threading.Condition()
        self._failure = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvtrace", daemon=True)
        self._thread.start()

    def submit(self, action, tensors):
        """Has `action` called with the list of host copies of `tensors`, which may be written over after this call.

        Raises what an earlier action raised.
        """
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure or self._waiting == 0 or self._waiting + size <= _WAITING_BYTES)
            self._raise_failure()
            self._waiting += size
        copies, event = self._copy(tensors)
        with self._changed:
            self._work.append((action, copies, event, size))
            self._changed.notify_all()

    def close(self):
        """Waits for all actions. Raises what one of them raised."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._raise_failure()

    def abandon(self):
        """Drops what has not been done; waits for what is being done."""
        with self._changed:
            self._work.clear()
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _raise_failure(self):
        if self._failure is not None:
            raise self._failure

    def _copy(self, tensors):
        """Copies on the host, and the event after which they are there (None: they are)."""
        device = next((tensor.device for tensor in tensors if tensor.device.type == "cuda"), None)
        if device is None:
            return [torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor) for tensor in tensors], None
        if self._in_flight is not None:
            self._in_flight.synchronize()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        copies = []
        with torch.cuda.stream(stream):
            for tensor in tensors:
                copies.append(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True))
                copies[-1].copy_(tensor, non_blocking=True)
                if tensor.device == device:
                    # Its memory is not given to others before the copy has left.
                    tensor.record_stream(stream)
            self._in_flight = stream.record_event()
        return copies, self._in_flight

    def _run(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._work or self._closed)
                if not self._work:
                    return
                action, copies, event, size = self._work.popleft()
            try:
                if self._failure is None:
                    if event is not None:
                        event.synchronize()
                    action(copies)
            except BaseException as failure:  # told to the thread that runs the model
                self._failure = failure
            del action, copies  # not to be held while there is nothing to do
            with self._changed:
                self._waiting -= size
                self._changed.notify_all()
