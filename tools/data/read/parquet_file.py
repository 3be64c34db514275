"""Rows of one column of a Parquet file, a few at a time.

In: a file, the name of a column of texts. Out: (row, UTF-8 text or None, share of the file's bytes). Pages are read one at a
time, so that memory holds one page, compressed and not, its dictionary, and the rows in hand. How large a page is was decided
by whoever wrote the file: pyarrow ends a page after 1,024 rows at the earliest.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from configs.errors import ConfigError, Problem

ROWS_BYTES = 4 << 20
"""Text that is decoded at a time, by the mean size of a row group's rows."""
DICTIONARY_ROWS_BYTES = 64 << 20
"""Text that is decoded at a time when every row is as large as the whole dictionary."""
MOST_ROWS = 64
"""Bound where a few large rows stand together among many small ones. A call for 64 rows takes 20 µs."""
BUFFER_BYTES = 1 << 20


def rows(name: str, text_key: str) -> Iterator[tuple[int, bytes | None, int]]:
    """The rows in order. Raises ConfigError when the file isn't Parquet, or the column is absent or no text; OSError."""
    import pyarrow as pa  # noqa: PLC0415  (0.3 s, for Parquet only)
    from pyarrow import parquet  # noqa: PLC0415

    with open(name, "rb") as file:
        try:
            table = parquet.ParquetFile(file, buffer_size=BUFFER_BYTES, page_checksum_verification=True)
            _check_column(table.schema_arrow, name, text_key)
            yield from _rows(table, text_key)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # of the disk; a broken page is an OSError of Arrow, without a number
                raise
            rule = f"the file must be Parquet and whole, with a column {text_key!r} of texts: {str(error)[:200]}"
            raise ConfigError(Problem("--corpus", name, rule, "copy the file again, or name another")) from error


def _check_column(schema: Any, name: str, text_key: str) -> None:
    from pyarrow import types  # noqa: PLC0415

    count = schema.names.count(text_key)
    if count != 1:
        names = ", ".join(schema.names[:20]) or "no column"
        rule = f"the file must have the column {text_key!r}, once; it has {names}"
        raise ConfigError(Problem("--corpus", name, rule, "name the column with --text-key"))
    kind = schema.field(text_key).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    strings = (types.is_string, types.is_large_string, types.is_string_view)
    if not any(fits(kind) for fits in (*strings, types.is_binary, types.is_large_binary, types.is_binary_view)):
        texts = [field.name for field in schema if any(fits(field.type) for fits in strings)]
        rule = f"the column {text_key!r} must be of texts, it is of {kind}; columns of texts: {', '.join(texts[:20]) or 'none'}"
        raise ConfigError(Problem("--corpus", name, rule, "name a column of texts with --text-key"))


def _rows(table: Any, text_key: str) -> Iterator[tuple[int, bytes | None, int]]:
    import pyarrow as pa  # noqa: PLC0415

    row = 0
    for group in range(table.num_row_groups):
        stored = table.metadata.row_group(group)
        if not stored.num_rows:
            continue
        columns = [stored.column(number) for number in range(stored.num_columns)]
        count = _rows_at_a_time(next(column for column in columns if column.path_in_schema == text_key), stored.num_rows)
        read_bytes = sum(column.total_compressed_size for column in columns) // stored.num_rows
        for part in table.iter_batches(count, row_groups=[group], columns=[text_key], use_threads=False):
            texts = part.column(0)
            texts = texts.dictionary_decode() if isinstance(texts, pa.DictionaryArray) else texts
            large = pa.types.is_large_string(texts.type)
            for text in texts.cast(pa.large_binary() if large else pa.binary()).to_pylist():  # not checked as UTF-8
                yield row, text, read_bytes
                row += 1


def _rows_at_a_time(column: Any, num_rows: int) -> int:
    """Rows that are decoded at a time. A value of a dictionary, which is stored once, may stand in every row."""
    ratio = max(column.total_uncompressed_size / max(column.total_compressed_size, 1), 1)
    count = ROWS_BYTES * num_rows // max(column.total_uncompressed_size, 1)
    if column.has_dictionary_page and column.dictionary_page_offset:
        dictionary_bytes = ratio * (column.data_page_offset - column.dictionary_page_offset)
        count = min(count, int(DICTIONARY_ROWS_BYTES // max(dictionary_bytes, 1)))
    return min(max(count, 1), MOST_ROWS)
