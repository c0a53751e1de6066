"""``all_or_none``: a change of several weights happens whole or not at all, whatever interrupts it."""

import contextlib
import signal
import threading

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")


class _Waiting:
    """Signals that came while they could not be handled."""

    def __init__(self):
        self.handlers, self.arrived = {}, []

    def note(self, number, frame):
        self.arrived.append((number, frame))

    def deliver(self):
        """Runs the handlers of what came, which usually raise (KeyboardInterrupt)."""
        while self.arrived:
            number, frame = self.arrived.pop(0)
            self.handlers[number](number, frame)


@contextlib.contextmanager
def signals_wait():
    """Python's signal handlers run when ``deliver()`` is called, or at the end; C handlers are left alone.

    A handler that raises between the write of a weight and the note of what was written would lose the way back.
    Handlers run in the main thread only, so in others there is nothing to do; nor inside of another such block,
    where the outer one delivers.
    """
    waiting = _Waiting()
    if isinstance(getattr(signal.getsignal(signal.SIGINT), "__self__", None), _Waiting):
        yield waiting
        return
    with contextlib.ExitStack() as handlers:  # takes SIGINT first and gives it back last
        for name in _NAMES:
            number = getattr(signal, name, None)
            handler = None if number is None else signal.getsignal(number)
            if callable(handler) and threading.current_thread() is threading.main_thread():
                waiting.handlers[number] = handler
                handlers.callback(signal.signal, number, handler)
                signal.signal(number, waiting.note)
        yield waiting
    waiting.deliver()


class Together:
    """Layers that change in one step, as one of those that :func:`all_or_none` takes."""

    def __init__(self, layers):
        self.layers = layers

    def merge_state(self):
        return [layer.merge_state() for layer in self.layers]

    def restore_merged(self, states):
        for layer, state in zip(self.layers, states, strict=True):
            layer.restore_merged(state)


def all_or_none(layers, action, finish=lambda: None):
    """``action(layer)`` on each; after any error, or a signal whose handler raises, every layer is as before.

    Args:
        layers: iterable of :class:`MergedWeight` or :class:`Together`.
        action: takes a layer from one state to another, or raises and leaves it as it was.
        finish: called when all is done; must not fail.
    """
    before = []
    with signals_wait() as waiting:
        try:
            for layer in layers:
                waiting.deliver()
                before.append((layer, layer.merge_state()))
                action(layer)
            waiting.deliver()
            finish()
        except BaseException:
            failure = None
            for layer, state in reversed(before):
                try:
                    layer.restore_merged(state)
                except Exception as error:  # the other layers are restored all the same
                    failure = failure or error
            if failure is not None:
                raise RuntimeError(f"a layer could not be restored: {failure}") from failure
            raise
