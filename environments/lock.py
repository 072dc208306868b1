"""Prints a lock file: `pip install --dry-run --report - ... | python lock.py "HEADER"`.

Reads pip's installation report (https://pip.pypa.io/en/stable/reference/installation-report/) and prints each package with its version.
"""

import json
import sys


def pins(report: dict) -> list[str]:
    """`name==version` of every package in the report, sorted by name; without a local part such as `+cpu`."""
    packages = (package["metadata"] for package in report["install"])
    return sorted(f"{p['name'].lower().replace('_', '-')}=={p['version'].split('+')[0]}" for p in packages)


if __name__ == "__main__":
    print(f"# {sys.argv[1]}")
    print("\n".join(pins(json.load(sys.stdin))))
