"""Segments → subtitles, as SubRip (srt) and WebVTT (vtt) files."""

from collections.abc import Iterable

from extensions.openai.responses import Json


def to_srt(segments: Iterable[Json]) -> str:
    return "".join(
        f"{number}\n{_to_span(segment, ',')}\n{_to_line(segment)}\n\n"
        for number, segment in enumerate(segments, 1)
    )


def to_vtt(segments: Iterable[Json]) -> str:
    cues = (f"{_to_span(segment, '.')}\n{_to_line(segment)}\n\n" for segment in segments)
    return "".join(["WEBVTT\n\n", *cues])


def _to_span(segment: Json, separator: str) -> str:
    start, end = (_to_timestamp(segment[key], separator) for key in ("start", "end"))
    return f"{start} --> {end}"


def _to_timestamp(seconds: float, separator: str) -> str:
    """61.5 → 00:01:01.500"""
    total = round(seconds * 1000)
    minutes, milliseconds = divmod(total, 60_000)
    hours, minutes = divmod(minutes, 60)
    whole, fraction = divmod(milliseconds, 1000)
    return f"{hours:02}:{minutes:02}:{whole:02}{separator}{fraction:03}"


def _to_line(segment: Json) -> str:
    """One line, without what separates two times."""
    return " ".join(segment["text"].split()).replace("-->", "->")
