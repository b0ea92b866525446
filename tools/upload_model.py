"""Upload an exported model (tools/convert_checkpoint.py --to hf) to the Hugging Face hub, by default privately.

    tools/upload_model.py --input MODEL --repo NAME/MODEL

Log in first: `hf auth login`, or the environment variable HF_TOKEN.
"""

import argparse
import sys
from pathlib import Path

from yoco_megatron.convert.upload import upload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, type=Path, help="folder of the exported model")
    parser.add_argument("--repo", required=True, help="NAME/MODEL on the hub; made if it is not there")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--revision", help="branch to upload to (default: main)")
    options = parser.parse_args()
    try:
        print(upload(options.input, options.repo, public=options.public, revision=options.revision))
    except ValueError as error:
        sys.exit(f"upload_model.py: error: {error}")


if __name__ == "__main__":
    main()
