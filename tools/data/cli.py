"""`phalanx data`: make tokenizers and token files, inspect them, trace a run's data. In: arguments. Out: an exit code.

Raises ConfigError for bad input; tools/cli.py prints it and exits 2.

Torch-free.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, Problem, json_problem, report
from pretrain.run.files import storage_problem
from tools.data.faults import TokenizeFailed

SHOWN_SKIPPED = 20
LARGE_CHARS = 4_000_000
EPILOG = """\
sources (--corpus, one or more):
  embedded        text of the running Python: the language reference and the standard library
  FILE            .txt (one document), .jsonl, .ndjson, .json, .parquet; all but Parquet also as .gz, .zst, .zstd, .bz2, .xz
  FOLDER          all such files in it, in the order of their paths; links are followed, each file is read once, and a
                  line on stderr says what was left out: hidden files, other kinds of files, tokenizers, token files

example, from no data to training data:
  phalanx data tokenizer --corpus embedded --vocab-size 2048 --out data/tokenizer.model
  phalanx data tokenize --corpus embedded --tokenizer data/tokenizer.model --out data/train
  phalanx data inspect data/train --tokenizer data/tokenizer.model

the data behind a run:
  phalanx data trace runs/NAME --step 120 --text
  phalanx data trace runs/NAME --document train:17
  phalanx data ledger runs/NAME
"""


def main(argv: list[str]) -> int:
    """Run one subcommand. Returns 0, or 1 when it was interrupted or the machine failed. Raises ConfigError for bad input."""
    arguments = _parser().parse_args(argv)
    former = signal.signal(signal.SIGTERM, _interrupt)
    try:
        result, text = arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted: no file was written", file=sys.stderr)
        return 1
    except (TokenizeFailed, MemoryError) as error:
        memory = Problem("memory", None, "there must be enough memory; no file was written", "cut large documents, or give more")
        problem = error.problem if isinstance(error, TokenizeFailed) else memory
        if arguments.json:
            print(json.dumps({"ok": False, "problems": [json_problem(problem)]}))
        print(report([problem]), file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, former)
    print(json.dumps(result, ensure_ascii=False) if arguments.json else text)
    return 0


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="phalanx data", description="Tokenizers, token files, and the data behind a run.", epilog=EPILOG, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("--corpus", nargs="+", required=True, metavar="SRC", help="embedded, files or folders")
    source.add_argument("--text-key", default="text", metavar="KEY", help="JSON key or Parquet column (default: text)")
    source.add_argument("--split-blank-lines", action="store_true", help="in .txt files, a blank line ends a document")
    source.add_argument(
        "--skip-bad", type=_count, default=0, metavar="N", help="pass over up to N bad lines, rows or documents (default: 0)"
    )
    source.add_argument("--json", action="store_true", help="print one JSON document on stdout")

    train = commands.add_parser("tokenizer", parents=[source], help="train a sentencepiece tokenizer")
    train.add_argument("--out", required=True, metavar="PATH.model", help="file to write; tokenizer.json goes beside it")
    train.add_argument("--vocab-size", type=_positive, default=32000, metavar="N", help="number of tokens (default: 32000)")
    train.add_argument("--model", choices=("bpe", "unigram"), default="bpe", help="algorithm (default: bpe)")
    train.add_argument("--max-mb", type=_size, default=64.0, metavar="MB", help="amount of training text (default: 64)")
    train.set_defaults(run=_tokenizer)

    encode = commands.add_parser("tokenize", parents=[source], help="encode a corpus to PREFIX.bin and PREFIX.idx")
    encode.add_argument("--tokenizer", required=True, metavar="PATH", help="sentencepiece .model or Hugging Face tokenizer.json")
    encode.add_argument("--out", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx and PREFIX.meta.json")
    encode.add_argument("--workers", type=_positive, metavar="N", help="number of processes (default: one per core)")
    encode.add_argument("--max-mb", type=_size, metavar="MB", help="tokenize only the first MB megabytes of text")
    eod = argparse.BooleanOptionalAction
    encode.add_argument("--append-eod", action=eod, default=True, help="end each document with the end-of-document token")
    encode.add_argument(
        "--eod", metavar="TEXT", help="the end-of-document token, as data.tokenizer.eod (default: the first of the usual names)"
    )
    encode.add_argument(
        "--special-tokens",
        choices=("token", "text"),
        default="token",
        help="a special token's name in the text, such as <|endoftext|>: as the tokenizer reads it, or as plain characters",
    )
    encode.set_defaults(run=_tokenize)

    inspect = commands.add_parser("inspect", help="show what token files or a tokenizer hold")
    inspect.add_argument("path", metavar="PREFIX|TOKENIZER")
    inspect.add_argument("--tokenizer", metavar="PATH", help="show documents as text, and check that data and tokenizer match")
    inspect.add_argument("--documents", type=int, default=3, metavar="N", help="number of documents to show (default: 3)")
    inspect.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    inspect.set_defaults(run=_inspect)
    _add_run_commands(commands)
    return parser


def _add_run_commands(commands: Any) -> None:
    trace = commands.add_parser("trace", help="the documents behind a step of a run, or the steps that see a document")
    trace.add_argument("run_dir", metavar="RUN", help="a run folder; its token files must lie where its config says")
    what = trace.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=_steps, metavar="N[:M]", help="the samples of step N, or of the steps N to M")
    what.add_argument(
        "--document", type=_document, metavar="FILE:ID", help="the steps that have read or will read document ID of a token file"
    )
    trace.add_argument("--rank", type=_count, metavar="R", help="only the samples of this rank")
    trace.add_argument("--text", action="store_true", help="show the text of each document's tokens")
    trace.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    trace.set_defaults(run=_trace)

    ledger = commands.add_parser("ledger", help="tokens and epochs of a run by source")
    ledger.add_argument("run_dir", metavar="RUN", help="a run folder; its token files must lie where its config says")
    ledger.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    ledger.set_defaults(run=_ledger)


def _steps(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    steps = _positive(first), _positive(last if colon else first)
    if steps[1] < steps[0]:
        raise argparse.ArgumentTypeError(f"N:M needs N at most M, got {text}")
    return steps


def _document(text: str) -> tuple[str, int]:
    file, _, number = text.rpartition(":")
    if not file:
        raise argparse.ArgumentTypeError(f"must be FILE:ID, got {text}")
    return file.removesuffix(".bin").removesuffix(".idx"), _count(number)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return number


def _size(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return number


# Each command imports its own modules: sentencepiece's trainer, rich and numpy take 0.3 s, which --help must not.


def _tokenizer(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from tools.data import train_tokenizer  # noqa: PLC0415
    from tools.data.read import find_files  # noqa: PLC0415

    corpus = find_files.expand(arguments.corpus, arguments.split_blank_lines)
    _note(corpus.left_out_summary())
    found = train_tokenizer.train(
        corpus,
        arguments.out,
        vocab_size=arguments.vocab_size,
        kind=arguments.model,
        max_bytes=arguments.max_mb * 1e6,
        text_key=arguments.text_key,
        skip_bad=arguments.skip_bad,
    )
    found["left_out"] = [vars(item) for item in corpus.left_out]
    _note_skipped(found["skipped"])
    text = f"{found['path']}: {found['vocab_size']:,} tokens from {found['text_bytes'] / 1e6:.1f} MB of text"
    if found["tokenizer_json"]:
        return found, f"{text}\n{found['tokenizer_json']}: the same tokenizer for Hugging Face"
    print(f"WARNING: no tokenizer.json was written: {found['not_exported_because']}", file=sys.stderr)
    return found, text


def _tokenize(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from pretrain.data.tokenizer import load_tokenizer, section_for  # noqa: PLC0415
    from tools.data.encode import read_special_tokens_as_text  # noqa: PLC0415
    from tools.data.read import find_files  # noqa: PLC0415
    from tools.data.tokenize import tokenize  # noqa: PLC0415

    problems: list[Problem] = []
    corpus, tokenizer = None, None
    try:
        corpus = find_files.expand(arguments.corpus, arguments.split_blank_lines, arguments.tokenizer)
    except ConfigError as error:
        problems += error.problems
    try:
        section = section_for(arguments.tokenizer)
        section.eod = arguments.eod
        tokenizer = load_tokenizer(section, "--tokenizer")
        if arguments.special_tokens == "text":
            read_special_tokens_as_text(tokenizer)
    except ConfigError as error:
        problems += error.problems
    if problems or tokenizer is None or corpus is None:
        raise ConfigError(problems)
    _note(corpus.left_out_summary())
    found = tokenize(
        corpus,
        tokenizer,
        arguments.out,
        workers=arguments.workers or len(os.sched_getaffinity(0)),
        append_eod=arguments.append_eod,
        text_key=arguments.text_key,
        max_bytes=arguments.max_mb and arguments.max_mb * 1e6,
        eod=arguments.eod,
        skip_bad=arguments.skip_bad,
        special_as_text=arguments.special_tokens == "text",
    )
    found["left_out"] = [vars(item) for item in corpus.left_out]
    _note_skipped(found["skipped"])
    _note_special(found["special_tokens_in_text"])
    _note_whole(*found["whole"])
    rate = found["text_bytes"] / found["elapsed_s"] / 1e6
    text = f"{found['prefix']}.bin: {found['num_tokens']:,} tokens in {found['num_documents']:,} documents, {rate:.1f} MB/s; "
    return found, text + f"unigram entropy {found['unigram_entropy_nats']:.4f} nats a token"


def _note(text: str) -> None:
    if text:
        print(text, file=sys.stderr, flush=True)


def _note_skipped(skipped: list[dict[str, str]]) -> None:
    """What --skip-bad passed over, at most SHOWN_SKIPPED of it."""
    if skipped:
        lines = [f"  {item['place']}: {item['rule']}" for item in skipped[:SHOWN_SKIPPED]]
        more = [f"  and {len(skipped) - SHOWN_SKIPPED:,} more; --json lists all"] if len(skipped) > SHOWN_SKIPPED else []
        _note("\n".join([f"WARNING: {len(skipped):,} bad lines, rows or documents were passed over:", *lines, *more]))


def _note_special(counts: dict[str, int]) -> None:
    if counts:
        names = ", ".join(f"{name} {count:,} times" for name, count in counts.items())
        text = (
            f"WARNING: the text itself spells special tokens, and they were encoded as such: {names}. An end-of-document token "
        )
        _note(text + "ends a document there. --special-tokens text reads them as plain characters.")


def _note_whole(chars: int, reason: str) -> None:
    if chars >= LARGE_CHARS:
        text = (
            f"note: a document of {chars / 1e6:,.0f} million characters was encoded in one piece, which takes much memory, since "
        )
        _note(text + f"this tokenizer has no place to cut a text with the same ids: {reason}")


def _inspect(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from tools.data import inspect  # noqa: PLC0415

    path = arguments.path.removesuffix(".bin").removesuffix(".idx")
    if Path(arguments.path).suffix in (".model", ".json") and not Path(f"{path}.idx").exists():
        found = inspect.inspect_tokenizer(arguments.path)
    else:
        found = inspect.inspect_data(path, arguments.tokenizer, arguments.documents)
    return found, inspect.render(found)


def _trace(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from tools.data import trace, trace_text  # noqa: PLC0415

    with _history(arguments.run_dir) as history:
        if arguments.document:
            found = trace.trace_document(history, *arguments.document)
            return found, trace_text.render_document(found)
        first, last = arguments.step
        found = trace.trace_steps(history, first, last, arguments.rank, arguments.text)
        return found, trace_text.render_steps(found)


def _ledger(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from tools.data import ledger  # noqa: PLC0415

    with _history(arguments.run_dir) as history:
        found = ledger.read_ledger(history)
        return found, ledger.render_ledger(found)


@contextmanager
def _history(run_dir: str) -> Iterator[Any]:
    """The history of a run folder. Raises ConfigError, also for a file that can't be read inside the block."""
    from launch.status import require_run_folder  # noqa: PLC0415
    from pretrain.data.history import RunHistory  # noqa: PLC0415

    try:
        history = RunHistory(require_run_folder(run_dir))
        if lacks := history.lacks():
            _note(f"note: {run_dir}: {lacks}")
        yield history
    except OSError as error:
        raise ConfigError(storage_problem("RUN", run_dir, error)) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
