"""Draws a report as one SVG, without a drawing library: the stages of a request in time, and time per stage."""

from __future__ import annotations

from html import escape
from pathlib import Path

from chunkkv.files import write_whole
from chunkkv.profile.report import COMPRESSION, Report, in_order
from chunkkv.profile.trace import Range, Trace

_COLOURS = {"prefill": "#4878a8", "decode": "#e0a030", "sample": "#8a8a8a", "load": "#b8b8b8"}
_COMPRESSION, _OTHER = "#c44e52", "#6a9f58"
_WIDTH, _LEFT, _RIGHT, _ROW = 960, 110, 120, 26
_MOST_BARS = 2000


def write_picture(trace: Trace, report: Report, path: Path) -> None:
    """Write the picture of a trace and its report as SVG."""
    lines: list[str] = []
    height = _timeline(trace, 16, lines)
    height = _bars(report, height + 24, lines)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}"'
    style = ' font-family="sans-serif" font-size="13" fill="#222">'
    background = f'<rect width="{_WIDTH}" height="{height}" fill="white"/>'
    write_whole(path, "\n".join([head + style, background, *lines, "</svg>"]) + "\n")


def _timeline(trace: Trace, top: int, lines: list[str]) -> int:
    """Draw the last request, the one that is warm, one lane per stage; return where the next thing may begin."""
    requests = [span for span in trace.ranges if span.name == "request"]
    if not requests:
        return top
    request = max(requests, key=lambda span: span.start_ns)
    inside = [
        stage
        for stage in trace.ranges
        if stage.nested and request.start_ns <= stage.start_ns and stage.end_ns <= request.end_ns
    ]
    total = max(request.end_ns - request.start_ns, 1)
    lines.append(_text(_LEFT, top, f"Request {request.request_id}: {total / 1e6:.1f} ms, one lane per stage"))
    top += 10
    for name in in_order({stage.name for stage in inside}):
        lines.append(_text(8, top + _ROW * 0.65, name))
        lines.append(_rect(_LEFT, top + _ROW - 2, _WIDTH - _LEFT - _RIGHT, 1, "#dddddd"))
        for stage in _thinned_out([stage for stage in inside if stage.name == name]):
            start = _LEFT + (stage.start_ns - request.start_ns) / total * (_WIDTH - _LEFT - _RIGHT)
            width = max((stage.end_ns - stage.start_ns) / total * (_WIDTH - _LEFT - _RIGHT), 0.5)
            title = f"{name}: {(stage.end_ns - stage.start_ns) / 1e6:.3f} ms"
            lines.append(_rect(start, top + 4, width, _ROW - 8, _colour(name), title))
        top += _ROW
    return top


def _bars(report: Report, top: int, lines: list[str]) -> int:
    """Draw each stage's own time, of the GPU where kernels were traced; return the picture's height."""
    gpu = report.kernel_ns > 0
    stages = [stage for stage in report.stages if stage.name not in ("load", "warmup")]
    values = [stage.own_kernel_ns if gpu else stage.own_ns for stage in stages]
    most, whole = max([1, *values]), max(sum(values), 1)
    lines.append(_text(_LEFT, top, f"{'GPU kernel' if gpu else 'Host'} time by stage, all requests"))
    top += 10
    for stage, value in zip(stages, values, strict=True):
        width = value / most * (_WIDTH - _LEFT - _RIGHT)
        lines.append(_text(8, top + _ROW * 0.65, stage.name))
        lines.append(_rect(_LEFT, top + 4, max(width, 0.5), _ROW - 8, _colour(stage.name)))
        lines.append(_text(_LEFT + width + 6, top + _ROW * 0.65, f"{value / 1e6:.1f} ms ({value / whole:.0%})"))
        top += _ROW
    return top + 12


def _thinned_out(ranges: list[Range]) -> list[Range]:
    """Return at most _MOST_BARS of the ranges, evenly: no screen could show more."""
    step = -(-len(ranges) // _MOST_BARS)
    return ranges[:: max(step, 1)]


def _colour(name: str) -> str:
    return _COMPRESSION if name in COMPRESSION else _COLOURS.get(name, _OTHER)


def _text(x: float, y: float, text: str) -> str:
    shown = "".join(letter for letter in text if letter.isprintable())  # others make the XML invalid
    return f'<text x="{x:.1f}" y="{y:.1f}">{escape(shown)}</text>'


def _rect(x: float, y: float, width: float, height: float, colour: str, title: str = "") -> str:
    inner = f"<title>{escape(title, quote=False)}</title>" if title.isprintable() and title else ""
    return f'<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}" fill="{colour}">{inner}</rect>'
