"""Calibration and evaluation text: reading files and datasets, and cutting them into windows of token ids."""

from slimllm.calibration.bos import about_bos, window_bos
from slimllm.calibration.files import check_regular, shown
from slimllm.calibration.formats import recognise
from slimllm.calibration.mixture import sources_of
from slimllm.calibration.records import check_messages, fields_of, has_empty, is_unicode, rendered
from slimllm.calibration.texts import bundled_text, read_texts
from slimllm.calibration.windows import (
    Calibration,
    calibration_name,
    calibration_windows,
    check_seq_len,
    draw_windows,
    longest_input,
    num_held_out,
    tokenize,
    windows_of,
)

__all__ = [
    "Calibration",
    "about_bos",
    "bundled_text",
    "calibration_name",
    "calibration_windows",
    "check_messages",
    "check_regular",
    "check_seq_len",
    "draw_windows",
    "fields_of",
    "has_empty",
    "is_unicode",
    "longest_input",
    "num_held_out",
    "read_texts",
    "recognise",
    "rendered",
    "shown",
    "sources_of",
    "tokenize",
    "window_bos",
    "windows_of",
]
