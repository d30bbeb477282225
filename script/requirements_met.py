"""Exit 0 when this Python has exactly what the given requirement files ask for, else say what lacks.

Standard library only: it runs before anything is installed.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LINE = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;]+)\s*(?:;\s*sys_platform\s*==\s*[\"'](\w+)[\"'])?$")


def wanted(path: Path) -> list[tuple[str, str]]:
    """``(name, version)`` of every requirement in a file that applies to this system."""
    found = []
    for raw in path.read_text(encoding="utf-8").splitlines():
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        match = LINE.match(line)
        if match is None:
            sys.exit(f"{path}: cannot read the line {raw!r}; expected name==version")
        name, pinned, system = match.groups()
        if system is None or system == sys.platform:
            found.append((name, pinned))
    return found


def lacking(name: str, pinned: str) -> str | None:
    """What is wrong with an installed package; a local build tag (+cpu) is fine."""
    try:
        have = version(name)
    except PackageNotFoundError:
        return f"{name} is not installed"
    if have.split("+", 1)[0] != pinned:
        return f"{name} is {have}, {pinned} is asked for"
    return None


def main(paths: list[str]) -> int:
    problems = [lacking(*requirement) for path in paths for requirement in wanted(Path(path))]
    problems = [problem for problem in problems if problem]
    print("; ".join(problems[:3]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
