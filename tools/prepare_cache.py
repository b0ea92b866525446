"""Build the index caches of a run off the cluster. Takes exactly the flags and configs of pretrain_yoco.py.

Training finds them in --data-cache-path, which both must name. File names are hashes of the data flags, the tokenizer
flags (its path as written) and --seq-length: other flags build other caches.
"""

import logging
import sys
import time
from pathlib import Path


def main() -> None:
    if {"--help", "-h"} & set(sys.argv):
        print(__doc__.strip())
        return
    # Slow imports, after --help.
    from yoco_megatron.startup.prepare import prepare

    prepare()  # before anything imports megatron
    from yoco_megatron.data.provider import prepare_cache
    from yoco_megatron.startup import arguments

    logging.getLogger("megatron").setLevel(logging.WARNING)
    started = time.monotonic()
    try:
        args = arguments.parse_anywhere(sys.argv[1:])
        built = prepare_cache(args)
    except ValueError as error:
        sys.exit(f"prepare_cache.py: error: {error}")
    except OSError as error:
        sys.exit(f"prepare_cache.py: error: --data-cache-path: {error}")
    files = [path for path in Path(args.data_cache_path).rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"{args.data_cache_path}: {len(files)} files, {size:,} bytes, {time.monotonic() - started:.1f} s")
    for name, samples in built.items():
        print(f"{name}: {samples:,} samples")


if __name__ == "__main__":
    main()
