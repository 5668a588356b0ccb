"""Scripts for the shell that complete commands, sub-commands and flags; completing starts no Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fusedalign.commandline import CommandParser
from fusedalign.recipes import configurations

#: What follows a command, by its words: sub-commands, then flags.
Tree = Mapping[str, Sequence[str]]


def completion_script(shell: str, tree: Tree) -> str:
    """The script of a shell.

    Args:
        shell: one of `SHELLS`.
        tree: "" -> the commands; "bench" -> its sub-commands and flags; "bench trl" -> its flags.
    """
    return SHELLS[shell](tree)


def _bash(tree: Tree) -> str:
    cases = "\n".join(f"    {words!r}) words={' '.join(following)!r} ;;" for words, following in tree.items())
    return f"""\
# Completes `fusedalign` in bash and zsh.
_fusedalign() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" command="" word words=""
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case "${{command:+$command }}$word" in
      {"|".join(repr(words) for words in tree if words)}) command="${{command:+$command }}$word" ;;
      *) break ;;
    esac
  done
  case "$command" in
{cases}
  esac
  COMPREPLY=()
  if [[ "$previous" == "--config" && "$current" != -* ]]; then
    COMPREPLY=($(compgen -f -W {" ".join(configurations())!r} -- "$current"))
  elif [[ "$current" == -* || "$previous" != -* ]]; then
    COMPREPLY=($(compgen -W "$words" -- "$current"))
  fi
}}
complete -o default -F _fusedalign fusedalign
"""


def _zsh(tree: Tree) -> str:
    return f"autoload -Uz bashcompinit && bashcompinit\n{_bash(tree)}"


def _fish(tree: Tree) -> str:
    lines = ["# Completes `fusedalign` in fish."]
    for words, following in tree.items():
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in words.split())
        start = f"complete -c fusedalign -n '{seen or '__fish_use_subcommand'}'"
        lines += [f"{start} -l {word[2:]}" if word.startswith("-") else f"{start} -f -a {word}" for word in following]
    lines.append(f"complete -c fusedalign -l config -r -a '{' '.join(configurations())}'")
    return "\n".join(lines) + "\n"


SHELLS: dict[str, Callable[[Tree], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}


def shell_of(argv: Sequence[str]) -> str | None:
    """The shell that the words of `fusedalign completion` name; None after its help. ValueError for other words."""
    parser = CommandParser(
        "fusedalign completion",
        "Prints a script that completes commands, sub-commands and flags; no Python starts while you type. "
        "Print it again after an upgrade of TRL or transformers, for their new flags.\n\n"
        "  bash  fusedalign completion bash > ~/.local/share/bash-completion/completions/fusedalign\n"
        "  zsh   fusedalign completion zsh > ~/.fusedalign.zsh, and in .zshrc: source ~/.fusedalign.zsh\n"
        "  fish  fusedalign completion fish > ~/.config/fish/completions/fusedalign.fish",
    )
    parser.add_argument("shell", nargs="?", metavar="SHELL", help=" or ".join(SHELLS))
    options = parser.parse(argv)
    if options is not None and options.shell not in SHELLS:
        raise ValueError(f"the shell must be one of {', '.join(SHELLS)}, got {options.shell or 'nothing'}")
    return None if options is None else options.shell
