"""What processes use, as Linux counts it: processor time and memory of a process with all its descendants."""

import os
import pathlib

_TICK = os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        fields = _fields(stat)
        if fields:
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for process in found:
        found.extend(children.get(process, []))
    return found


def cpu_seconds(pid: int) -> float:
    """Processor time that a process and its descendants have used so far; of those that have ended too, once they were waited for."""
    total = 0
    for process in tree(pid):
        fields = _fields(pathlib.Path(f"/proc/{process}/stat"))
        total += sum(map(int, fields[11:15])) if fields else 0
    return total / _TICK


def machine_seconds() -> float:
    """Processor time that the whole machine has used so far, and that its host took from it."""
    values = [int(value) for value in pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = values[:8]
    return (user + nice + system + irq + softirq + steal) / _TICK


def memory_bytes(pid: int) -> int:
    """Proportional set size of a process and its descendants: memory that several share is counted once."""
    total = 0
    for process in tree(pid):
        try:
            for line in pathlib.Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) << 10
        except OSError:
            pass  # it has ended
    return total


def _fields(stat: pathlib.Path) -> list[str]:
    """The fields of a stat file after the name, which may hold spaces; none if the process has ended."""
    try:
        return stat.read_text().rpartition(")")[2].split()
    except OSError:
        return []
