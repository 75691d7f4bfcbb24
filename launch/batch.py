"""The batch script of one job: a template of launch/slurm with its options and settings filled in."""

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from importlib import resources

_PLAIN = re.compile(r"[A-Za-z0-9_./:,@%=+-]+")
_UNWRITABLE = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")

_SECONDS_FOR_SBATCH = 120.0


def batch_script(
    verb: str, options: Mapping[str, str | None], extra: Sequence[str], words: Sequence[str], *, programs: str
) -> str:
    """The script that runs one verb with `words`, and can be submitted again as it is.

    Args:
        verb: The verb, whose template is filled in.
        options: Options of sbatch without their `--`, such as `{"nodes": "4", "exclusive": None}`; they take
            the place of the template's own.
        extra: Further ones, written as sbatch takes them; they come last, and win.
        words: Settings and flags of the verb, as they were typed.
        programs: Folder of the environment's programs, which comes first on the job's PATH.

    Raises:
        ValueError: A word or option that no line of a script can hold, or an extra one that is no option.
    """
    for word in words:
        if found := _UNWRITABLE.search(word):
            raise ValueError(f"{word!r} holds the character {found[0]!r}, which a batch script cannot")
    for word in extra:
        if not re.match(r"--[a-z]", word) or _UNWRITABLE.search(word):
            raise ValueError(f"{word!r} is not an option of sbatch, such as --constraint=a100")
    template = resources.files("sparsekd.launch").joinpath("slurm", f"{verb}.sbatch").read_text()
    lines = template.splitlines()
    settings = [line for line in lines if line.startswith("#SBATCH ")]
    body = lines[lines.index(settings[-1]) + 1 :]
    kept = [line for line in settings if _name(line) not in options]
    filled = [
        f"#SBATCH --{name}" + ("" if value is None else f"={_directive(name, value)}")
        for name, value in options.items()
    ]
    return "\n".join(
        [
            lines[0],
            f"# Written by `sparsekd {verb} launch=slurm`; submitted again with sbatch, it goes on.",
            *kept,
            *filled,
            *(f"#SBATCH {_directive_word(word)}" for word in extra),
            f"export PATH={shlex.quote(programs)}:$PATH",
            "set -- " + " \\\n  ".join(map(shlex.quote, words)),
            *body,
            "",
        ]
    )


def submit(path: str) -> str:
    """Hands a script to sbatch and returns the job's number.

    Raises:
        ValueError: sbatch is not there, or refuses the script; the message says what it said.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", path], capture_output=True, text=True, timeout=_SECONDS_FOR_SBATCH
        )
    except FileNotFoundError as error:
        raise ValueError(
            "sbatch is not on PATH here; call this on a machine that submits to Slurm, or see the script "
            "alone with --dry-run"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"sbatch gave no answer within {_SECONDS_FOR_SBATCH:.0f} s") from error
    job = done.stdout.strip().partition(";")[0]
    if done.returncode or re.fullmatch(r"[0-9]{1,18}", job) is None:
        said = " ".join((done.stderr or done.stdout).split())
        raise ValueError(f"sbatch refused {path}: {said or f'it ended with {done.returncode}'}")
    return job


def job_name(text: str) -> str:
    """A job's name of letters that every tool of Slurm prints as they are, 100 at most."""
    return re.sub(r"[^A-Za-z0-9_.=+-]", "-", text)[:100]


def _name(line: str) -> str:
    return line.removeprefix("#SBATCH --").partition("=")[0]


def _directive(name: str, value: str) -> str:
    """A value on a line of `#SBATCH`, which sbatch reads with quotes and backslashes of its own."""
    if _UNWRITABLE.search(value) or not value:
        raise ValueError(f"{value!r} cannot be --{name} of sbatch")
    return _directive_word(value)


def _directive_word(word: str) -> str:
    if _PLAIN.fullmatch(word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
