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
MOST_ROWS = 1024
BUFFER_BYTES = 1 << 20


def rows(name: str, text_key: str) -> Iterator[tuple[int, bytes | None, int]]:
    """The rows in order. Raises ConfigError when the file isn't Parquet, or the column is absent or no text; OSError."""
    import pyarrow as pa  # noqa: PLC0415  (0.3 s, for Parquet only)
    from pyarrow import parquet  # noqa: PLC0415

    with open(name, "rb") as file:
        try:
            options: dict[str, Any] = {"buffer_size": BUFFER_BYTES, "page_checksum_verification": True}
            plain = parquet.ParquetFile(file)
            _check_column(plain.schema_arrow, name, text_key)
            yield from _rows(parquet.ParquetFile(file, read_dictionary=[text_key], metadata=plain.metadata, **options), text_key)
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
    row = 0
    for group in range(table.num_row_groups):
        stored = table.metadata.row_group(group)
        if not stored.num_rows:
            continue
        columns = [stored.column(number) for number in range(stored.num_columns)]
        column = next(column for column in columns if column.path_in_schema == text_key)
        mean_bytes = max(column.total_uncompressed_size // stored.num_rows, 1)
        count = min(max(ROWS_BYTES // mean_bytes, 1), MOST_ROWS)
        read_bytes = sum(column.total_compressed_size for column in columns) // stored.num_rows
        for part in table.iter_batches(count, row_groups=[group], columns=[text_key], use_threads=False):
            for text in _texts(part.column(0)):
                yield row, text, read_bytes
                row += 1


def _texts(column: Any) -> Iterator[bytes | None]:
    """The bytes of each row, copied one at a time: a dictionary's value may stand in many rows."""
    import pyarrow as pa  # noqa: PLC0415

    values = column.dictionary if isinstance(column, pa.DictionaryArray) else column
    numbers = column.indices if isinstance(column, pa.DictionaryArray) else range(len(column))
    values = values.cast(pa.large_binary() if pa.types.is_large_string(values.type) else pa.binary())  # not checked as UTF-8
    for place in numbers:
        number = place if isinstance(place, int) else place.as_py()
        yield None if number is None else values[number].as_py()
