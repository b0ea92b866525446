"""Print what is installed, what training will use, and how to get what is missing. Exits with 1 if it cannot start."""

import argparse
import json
import sys
from dataclasses import asdict

from yoco_megatron.doctor import as_text, examine, is_healthy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    components, choices = examine()
    if args.json:
        content = {"healthy": is_healthy(components), "installed": components, "uses": choices}
        print(json.dumps(content, default=asdict, indent=1))
    else:
        print(as_text(components, choices))
    sys.exit(0 if is_healthy(components) else 1)


if __name__ == "__main__":
    main()
