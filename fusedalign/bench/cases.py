"""What is measured: heads, by name or written out as `N=4096,D=2048,V=151936,softcap=30`, and kinds of data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fusedalign.commandline import suggestion


@dataclass(frozen=True)
class Case:
    """The shape of an LM head and the number of tokens."""

    name: str
    tokens: int
    """N, a multiple of 4, because the dpo task splits them into four sequences"""
    hidden_size: int
    """D"""
    vocab: int
    """V"""
    softcap: float | None = None

    @property
    def flops(self) -> int:
        """2*N*D*V: one product of hidden states and head."""
        return 2 * self.tokens * self.hidden_size * self.vocab

    @property
    def title(self) -> str:
        """The name and the shape; for an unnamed case the shape only."""
        return str(self) if "=" in self.name else f"{self.name}: {self}"

    def __str__(self) -> str:
        shape = f"N={self.tokens}, D={self.hidden_size}, V={self.vocab}"
        return shape if self.softcap is None else f"{shape}, softcap={self.softcap:g}"


CASES = {
    case.name: case
    for case in (
        Case("qwen3-1.7b", 4096, 2048, 151936),
        Case("llama3-8b", 8192, 4096, 128256),
        Case("qwen3-4b", 8192, 2560, 151936),
        Case("gemma2-2b", 8192, 2304, 256000, 30.0),
        Case("tiny", 256, 64, 2048),
    )
}
DEFAULT_CUDA = ("qwen3-1.7b", "llama3-8b", "gemma2-2b")
DEFAULT_CPU = ("tiny",)
#: Of `--case`.
CASE_HELP = "a case that `fusedalign bench --help` lists, or N=..,D=..,V=..[,softcap=..]"
#: Of data: like those of a trained model, the default, or Gaussian. `data.py` makes them.
KINDS = ("trained", "random")


def parse_cases(words: Iterable[str]) -> list[Case]:
    """Parse the values of `--cases`.

    Args:
        words: each a comma-separated list of names, or one case as `N=..,D=..,V=..[,softcap=..]`.

    Raises:
        ValueError: an unknown name or field, or a number out of range.
    """
    cases: list[Case] = []
    for word in words:
        cases += [_custom(word)] if "=" in word else [_named(name.strip()) for name in word.split(",")]
    return cases


def parse_case(word: str) -> Case:
    """Parse the value of `--case`. Raises ValueError as `parse_cases` does, and for several cases."""
    case, *others = parse_cases([word])
    if others:
        raise ValueError(f"--case must be one case, got {word!r}")
    return case


def _named(name: str) -> Case:
    if name not in CASES:
        known, hint = ", ".join(CASES), suggestion(name, CASES)
        raise ValueError(f"a case must be one of {known}, or like N=4096,D=2048,V=151936, got {name!r}{hint}")
    return CASES[name]


def _custom(word: str) -> Case:
    fields = dict(part.strip().partition("=")[::2] for part in word.split(","))
    if not {"N", "D", "V"} <= fields.keys() <= {"N", "D", "V", "softcap"}:
        raise ValueError(f"a case must have N, D and V, and may have a softcap, got {word!r}")
    try:
        n, d, v = (int(fields[key]) for key in "NDV")
        softcap = float(fields["softcap"]) if "softcap" in fields else None
    except ValueError:
        raise ValueError(f"N, D and V of a case must be integers and softcap a number, got {word!r}") from None
    if n < 4 or n % 4 or d < 2 or v < 2 or not (softcap is None or softcap > 0):
        raise ValueError(f"a case must have N a multiple of 4, D and V of 2 or more and softcap > 0, got {word!r}")
    return Case(word, n, d, v, softcap)
