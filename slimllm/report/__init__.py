"""The page about a pruned model: one self-contained HTML file, and its pictures as PNGs."""

from slimllm.report.sample import Sample, make_sample
from slimllm.report.write import PAGE_NAME, PICTURE_FOLDER, write_page, write_page_of

__all__ = ["PAGE_NAME", "PICTURE_FOLDER", "Sample", "make_sample", "write_page", "write_page_of"]
