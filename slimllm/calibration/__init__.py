"""Calibration and evaluation text: from a file or a dataset to windows of token ids."""

from slimllm.calibration.texts import bundled_text, read_texts
from slimllm.calibration.windows import (
    Calibration,
    about_bos,
    calibration_name,
    calibration_windows,
    check_seq_len,
    draw_windows,
    longest_input,
    tokenize,
    window_bos,
    windows_of,
)

__all__ = [
    "Calibration", "about_bos", "bundled_text", "calibration_name", "calibration_windows", "check_seq_len", "draw_windows",
    "longest_input", "read_texts", "tokenize", "window_bos", "windows_of",
]  # fmt: skip
