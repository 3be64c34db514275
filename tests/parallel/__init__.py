"""Importing `parallel` first registers its finder, which must see every import of megatron."""

import parallel  # noqa: F401
