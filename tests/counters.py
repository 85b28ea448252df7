"""Energy counters that are files, as the kernel's are."""

import os
import threading
import time
from contextlib import contextmanager


class Counters:
    """A powercap folder whose packages draw a known power, until it is stopped."""

    def __init__(self, folder, watts, largest=1_000_000_000):
        self.zones, self.largest = [], largest
        for number, (name, power) in enumerate(watts.items()):
            zone = folder / f"intel-rapl:{number}"
            zone.mkdir()
            (zone / "name").write_text(f"{name}\n")
            (zone / "max_energy_range_uj").write_text(f"{largest}\n")
            self.zones.append((zone / "energy_uj", power))
        self.start = time.perf_counter()
        self.write()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def write(self):
        elapsed = time.perf_counter() - self.start
        for path, watts in self.zones:
            # They begin near the end of their range: every one starts anew soon.
            count = int(self.largest - 50_000 * watts + elapsed * watts * 1e6) % self.largest
            temporary = path.with_suffix(".tmp")
            temporary.write_text(f"{count}\n")
            os.replace(temporary, path)

    def run(self):
        while not self.stopped.wait(0.002):
            self.write()

    def stop(self):
        self.stopped.set()
        self.thread.join()


@contextmanager
def counting(folder, largest=1_000_000_000, **watts):
    """A powercap folder in which packages draw so many watts."""
    made = Counters(folder, watts, largest)
    made.thread.start()
    try:
        yield made
    finally:
        made.stop()
