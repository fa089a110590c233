"""What scripts/bench shows: medians, ratios and aims as a Markdown table, and docs/BENCHMARKS.md around it."""

import os
import platform
import statistics
import time
from pathlib import Path

BEGIN = "<!-- figures: written by scripts/bench -->"
END = "<!-- end of figures -->"


def ms(seconds):
    """Milliseconds, with a decimal where there are few."""
    return f"{seconds * 1e3:,.1f} ms" if seconds < 0.1 else f"{seconds * 1e3:,.0f} ms"


def us(seconds):
    """Microseconds."""
    return f"{seconds * 1e6:,.1f} µs"


class Table:
    """Rows of figures: ours, a peer's, and how many times as fast as the peer we are."""

    HEAD = ("work", "machinefs", "beside", "its figure", "times as fast", "middle half", "aim", "met")

    def __init__(self):
        self.rows = []
        self.notes = []
        self.loads = []
        self.begun = time.strftime("%Y-%m-%d")

    def note(self, text):
        """Remembers what could not be measured, or how."""
        if text not in self.notes:
            self.notes.append(text)

    def load(self):
        """Remembers how busy the host is."""
        self.loads.append(os.getloadavg()[0])

    def add(self, work, unit, figures, aims):
        """A row for each candidate but the first, which is ours; the figures are in turns, None where there is none.

        Each ratio is the median of the turns' own, so that what slows the host down for a while slows both.
        """
        (name, ours), *peers = figures.items()
        mine = [figure for figure in ours if figure is not None]
        own = f"{unit(statistics.median(mine))}" if mine else "—"
        shown = work if name == "machinefs" else f"{work} ({name})"
        for peer, theirs in peers:
            pairs = [(a, b) for a, b in zip(ours, theirs) if a is not None and b is not None]
            aim = aims.get(peer)
            goal = "—" if aim is None else f"≥ {aim:.2f} ×"
            if not pairs:
                self.rows.append((shown, own, peer, "—", "—", "—", goal, "not measured"))
                continue
            ratios = sorted(b / a for a, b in pairs)
            ratio, quarter = statistics.median(ratios), len(ratios) // 4
            self.rows.append((shown, own, peer, unit(statistics.median(b for _, b in pairs)), f"{ratio:.2f} ×",
                              f"{ratios[quarter]:.2f} – {ratios[-1 - quarter]:.2f}", goal,
                              "—" if aim is None else "yes" if ratio >= aim else "no"))

    def markdown(self):
        """The table."""
        rows = [self.HEAD, *self.rows]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self.HEAD))]
        lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join(lines)

    def facts(self, runs):
        """What the figures were taken on."""
        load = f"{min(self.loads):.1f} to {max(self.loads):.1f}" if self.loads else "unknown"
        return "\n".join([
            f"- {self.begun}, Linux {os.uname().release}, {distribution()}, {os.cpu_count()} × {processor()}, {memory()} GiB",
            f"- load average between rows: {load}; {runs} turns a row, fewer where a turn is long, and one before them "
            "that is not counted",
        ])

    def text(self, runs):
        """Facts, table and notes."""
        notes = "\n".join(f"- {note}" for note in self.notes)
        return f"{self.facts(runs)}\n\n{self.markdown()}\n" + (f"\n{notes}\n" if notes else "")

    def write(self, path, runs):
        """Puts the figures into a document, between its two marks."""
        text = Path(path).read_text(encoding="utf-8")
        head, found, rest = text.partition(BEGIN)
        _, closed, tail = rest.partition(END)
        if not (found and closed):
            raise SystemExit(f"bench: {path} has no place for the figures ({BEGIN} … {END})")
        Path(path).write_text(f"{head}{BEGIN}\n\n{self.text(runs)}\n{END}{tail}", encoding="utf-8")


def field(path, name):
    """The value of the first line `NAME : VALUE` or `NAME=VALUE` of a file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = (line.replace("=", ":", 1).partition(":")[2].strip() for line in lines if line.startswith(name))
    return next(found, None)


def distribution():
    return (field("/etc/os-release", "PRETTY_NAME") or platform.system()).strip('"')


def processor():
    return field("/proc/cpuinfo", "model name") or platform.machine()


def memory():
    return round(int((field("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) / 2**20)
