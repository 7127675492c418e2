"""The two figures, as plain SVG."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape

import msgspec

from benchmarks.peers import AMPD
from benchmarks.record import PeersRecord, Scenario, Stall, StallRecord
from benchmarks.report import by_round_trips

WIDTH, LEFT, RIGHT, ROW, HEAD = 760, 140, 180, 26, 44
LINE = 16
OURS, THEIRS, INK, FAINT = "#1a7f64", "#b0b7bf", "#24292f", "#d8dee4"
STEP_SECONDS = 0.05
PLOTTED_DELAY_MS = 5.0  # each way


class Bar(msgspec.Struct, frozen=True):
    """One subject's figure, with a note at the bar's end."""

    label: str
    value: float
    note: str


def peers_plot(record: PeersRecord) -> str:
    """Time over a network of 10 ms, with nothing pending and on an empty database."""
    away = f"server {PLOTTED_DELAY_MS * 2:g} ms away"
    panels = {
        f"Nothing pending, {away}": _bars(record, "nothing pending"),
        f"{record.migrations} migrations on an empty database, {away}": _bars(record, "fresh"),
    }
    height = 0
    elements: list[str] = []
    for title, bars in panels.items():
        elements += _panel(title, bars, height)
        height += HEAD + ROW * len(bars)
    return _svg(height + 12, elements)


def stall_plot(record: StallRecord) -> str:
    """How long, at each moment, the reader that waits longest has been waiting."""
    bottom, top = 330, 50
    end = 1 + max(
        record.hold_seconds, *(record.migrate_at_seconds + stall.migration_seconds for stall in record.stalls)
    )
    worst = max(stall.worst_seconds for stall in record.stalls)

    def x(seconds: float) -> float:
        return 50 + seconds / end * (WIDTH - 190)

    def y(seconds: float) -> float:
        return bottom - seconds / worst * (bottom - top)

    title = f"Other readers' stall while one reader holds the table for {record.hold_seconds:g} s"
    elements = [_text(10, 26, title, weight="bold")]
    for tick in range(0, int(worst) + 1, 5):
        elements.append(f'<path d="M50 {y(tick):.1f}H{WIDTH - 140}" stroke="{FAINT}"/>')
        elements.append(_text(42, y(tick) + 4, f"{tick} s", anchor="end"))
    elements += [_text(x(tick), bottom + 20, f"{tick} s", anchor="middle") for tick in range(0, int(end) + 1, 5)]
    for stall in sorted(record.stalls, key=lambda stall: stall.subject == AMPD.name):
        points = " ".join(f"{x(at):.1f},{y(waited):.1f}" for at, waited in _waited(stall, end))
        color = OURS if stall.subject == AMPD.name else THEIRS
        elements.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
    lowest = 0.0
    for stall in sorted(record.stalls, key=lambda stall: -stall.worst_seconds):
        lowest = max(y(stall.worst_seconds), lowest + LINE)
        label = f"{stall.subject}: {stall.worst_seconds:.2f} s"
        elements.append(_text(WIDTH - 132, lowest + 4, label, weight="bold"))
    return _svg(bottom + 40, elements)


def _bars(record: PeersRecord, scenario: Scenario) -> list[Bar]:
    bars = []
    for name in by_round_trips(record, scenario):
        if PLOTTED_DELAY_MS not in record.delays(name, scenario):
            continue
        seconds = record.median(name, scenario, PLOTTED_DELAY_MS)
        trips = record.median(name, scenario, PLOTTED_DELAY_MS, lambda sample: sample.round_trips)
        bars.append(Bar(name, seconds, f"{seconds:.2f} s, {trips:g} round trip{'' if trips == 1 else 's'}"))
    return bars


def _panel(title: str, bars: Sequence[Bar], top: int) -> Iterator[str]:
    yield _text(10, top + 28, title, weight="bold")
    longest = max(bar.value for bar in bars)
    for row, bar in enumerate(bars):
        middle = top + HEAD + ROW * row + ROW / 2
        length = bar.value / longest * (WIDTH - LEFT - RIGHT)
        color = OURS if bar.label == AMPD.name else THEIRS
        yield _text(LEFT - 8, middle + 4, bar.label, anchor="end")
        yield f'<rect x="{LEFT}" y="{middle - 9}" width="{length:.1f}" height="18" rx="2" fill="{color}"/>'
        yield _text(LEFT + length + 8, middle + 4, bar.note)


def _waited(stall: Stall, end: float) -> Iterator[tuple[float, float]]:
    for step in range(int(end / STEP_SECONDS) + 1):
        now = step * STEP_SECONDS
        yield now, max((now - w.start for w in stall.waits if w.start <= now < w.start + w.duration), default=0.0)


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'


def _svg(height: int, elements: Iterable[str]) -> str:
    frame = f'xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    style = f'font-family="system-ui, sans-serif" font-size="13" fill="{INK}"'
    body = "\n".join(elements)
    return f'<svg {frame} {style}>\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
