"""A trace as text. In: a dict of tools/data/trace.py. Out: lines.

Torch-free.
"""

from __future__ import annotations

import json
from typing import Any

_SHOWN_SIGHTINGS = 20
_SHOWN_CHARS = 200


def render_steps(found: dict[str, Any]) -> str:
    """The document of `trace_steps` as text: a line for each document."""
    lines: list[str] = []
    for step in found["steps"]:
        end = step["first_sample"] + step["seqs"] - 1
        attempt = f", attempt {step['attempt']}" if step["attempt"] else ""
        lines.append(f"step {step['step']}: {step['state']}{attempt}, samples {step['first_sample']:,} to {end:,}")
        for sample in step["samples"]:
            place = f"data rank {sample['data_rank']}, micro-batch {sample['micro_batch']}"
            lines.append(f"  sample {sample['sample']:,}: {sample['source']}, epoch {sample['epoch']}, {place}")
            for document in sample["documents"]:
                first, tokens = document["offset_tokens"], document["tokens"]
                span = f"tokens {first:,} to {first + tokens - 1:,} of {document['document_tokens']:,}"
                lines.append(f"    document {document['document']:,}: {span}")
                if "text" in document:
                    lines.append(f"      {json.dumps(document['text'][:_SHOWN_CHARS], ensure_ascii=False)}")
            if sample["room_tokens"]:
                lines.append(f"    {sample['room_tokens']:,} tokens of room")
    return "\n".join(lines)


def render_document(found: dict[str, Any]) -> str:
    """The document of `trace_document` as text."""
    head = f"{found['source']}: document {found['document']:,}, {found['document_tokens']:,} tokens"
    if found["held_out"]:
        return f"{head}: held out for validation (data.valid_fraction); no step reads it"
    if not found["seen"]:
        return f"{head}: no step up to the end of the run reads it"
    lines = []
    for seen in found["seen"][:_SHOWN_SIGHTINGS]:
        step = "no step" if seen["step"] is None else f"step {seen['step']}"
        place = f"sample {seen['sample']:,}, epoch {seen['epoch']}"
        lines.append(f"  {step} ({seen['state']}): {seen['tokens']:,} tokens in {place}")
    more = len(found["seen"]) - _SHOWN_SIGHTINGS
    return "\n".join([head, *lines, *([f"  and {more:,} more; --json lists all"] if more > 0 else [])])
