"""The part of a help page that lists settings: groups with their choices, keys with default and comment."""

from collections.abc import Sequence

from sparsekd.trainer.config.compose import groups
from sparsekd.trainer.config.options import options


def settings_lines(sections: Sequence[str]) -> list[str]:
    """The lines for some sections of the configuration, or single keys of one."""
    known = groups()
    shown = [name for name in known if name in sections or name in ("experiment", "debug")]
    leaves = list(options())
    lines = []
    if sections:
        lines.append("groups (group=choice):")
        lines += [f"  {name:<12} {', '.join(known[name])}" for name in shown]
    for section in sections:
        lines += ["", f"{section.partition('.')[0]}:"]
        for leaf in leaves:
            if section not in (leaf.key, leaf.key.rpartition(".")[0]):
                continue
            default = "null" if leaf.default is None else leaf.default
            choice = f" [{' | '.join(leaf.choices)}]" if leaf.choices else ""
            lines.append(f"  {leaf.key}={default}  ({leaf.type_name})")
            lines.append(f"      {leaf.comment}{choice}")
    return lines
