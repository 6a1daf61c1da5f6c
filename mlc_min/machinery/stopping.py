"""Stop between two steps and not within one."""

import signal


class StopRequest:
    """Within the block, SIGTERM and Ctrl-C set `signal` and do nothing else, so that a step ends whole; a second
    Ctrl-C interrupts at once. Where signals cannot be caught (another thread), nothing changes."""

    def __enter__(self):
        self.signal, self.before = 0, {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.before[number] = signal.signal(number, self.note)
            except ValueError:
                pass
        return self

    def note(self, number, frame) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
