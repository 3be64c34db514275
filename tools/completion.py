"""`phalanx completion bash|zsh`: a script that completes commands, their options, shipped configs and run folders.

The words come from the help text of each command's parser, so that the script knows what the parsers know.

Torch-free.
"""

from __future__ import annotations

import argparse
import importlib
import io
import re
from contextlib import redirect_stdout, suppress

from configs.sources import shipped_names
from tools.cli import COMMANDS

_SCRIPT = """_phalanx() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" words="" runs=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands} --help --version"
  else
    case "${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}}" in
{cases}
    esac
  fi
  COMPREPLY=( $(compgen -W "$words" -- "$cur") )
  [ -n "$runs" ] && COMPREPLY+=( $(compgen -d -- "${{cur:-runs/}}") )
  return 0
}}
complete -o default -F _phalanx phalanx
"""
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def help_of(name: str, *words: str) -> str:
    """What `phalanx NAME words --help` prints."""
    command, printed = COMMANDS[name], io.StringIO()
    argv = [*([name] if command.with_name else []), *words, "--help"]
    with redirect_stdout(printed), suppress(SystemExit):
        importlib.import_module(command.module).main(argv)
    return printed.getvalue()


def subcommands(text: str) -> list[str]:
    """The names under COMMAND in the help of a parser that has subcommands; the help indents each by four spaces."""
    found = re.search(r"^  COMMAND\n((?:    .*\n)+)", text, re.MULTILINE)
    return re.findall(r"^    (\S+)", found.group(1), re.MULTILINE) if found else []


def script(shell: str) -> str:
    """The script for `shell`: bash or zsh. zsh runs bash's through its bashcompinit."""
    cases = []
    for name in COMMANDS:
        if name == "completion":
            cases.append('    "completion "*) words="bash zsh" ;;')
            continue
        text = help_of(name)
        inner = subcommands(text)
        cases += [_case(f'"{name} {sub}"', help_of(name, sub)) for sub in inner]
        cases.append(_case(f'"{name} "*', text, inner))
    body = _SCRIPT.format(commands=" ".join(COMMANDS), cases="\n".join(cases))
    return (_ZSH if shell == "zsh" else "") + body


def _case(pattern: str, text: str, more: list[str] | None = None) -> str:
    options = sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)))
    configs = shipped_names() if re.search(r"\bCONFIG\b", text) else []
    runs = " runs=1" if re.search(r"\b(RUN_DIR|CHECKPOINT)\b", text) else ""
    return f'    {pattern}) words="{" ".join([*(more or []), *options, *configs])}"{runs} ;;'


def main(argv: list[str]) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="phalanx completion", description='A completion script: eval "$(phalanx completion bash)" in ~/.bashrc.'
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    print(script(parser.parse_args(argv).shell), end="")
    return 0
