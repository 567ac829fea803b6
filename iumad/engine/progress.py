"""Progress with time left: a bar on a terminal, a plain line now and then elsewhere. Always on stderr."""

import sys
import time
from types import TracebackType


class Progress:
    """Count ``total`` units of work under the name ``title``.

    On a terminal this is a tqdm bar; otherwise a line is printed at most every ``every`` seconds, and only
    for work that takes that long. ``quiet`` shows nothing.
    """

    def __init__(self, title: str, total: int, *, start: int = 0, quiet: bool = False, every: float = 10.0):
        self.title, self.total, self.done = title, total, start
        self._start, self._began, self._printed, self._every = (
            start,
            time.monotonic(),
            time.monotonic(),
            every,
        )
        self._bar = None
        self._note = ""
        self._quiet = quiet
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=start, desc=title, leave=False, dynamic_ncols=True, delay=0.5
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def note(self, text: str) -> None:
        """Show ``text`` behind the bar from now on."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def advance(self, count: int = 1) -> None:
        """Report ``count`` more units done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if not self._quiet and now - self._printed >= self._every:
            self._printed = now
            elapsed = now - self._began
            left = elapsed / max(self.done - self._start, 1) * (self.total - self.done)
            percent = 100 * self.done // self.total
            line = f"{self.title}: {self.done}/{self.total} ({percent} %), {clock(left)} left"
            print(f"{line}, {self._note}" if self._note else line, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Return a duration as ``m:ss`` or ``h:mm:ss``.

    >>> clock(75), clock(3700)
    ('1:15', '1:01:40')
    """
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
