"""Upload a controller to the Hugging Face hub: python -m controller.publish outputs/demo/controller owner/name

The token is that of `hf auth login`, or HF_TOKEN.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from controller.checkpoint import load_controller
from controller.hub import upload
from decoding.support.plain import plain_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Upload what the command line names; a user's mistake is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m controller.publish", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", help="the controller, as train.py wrote it")
    parser.add_argument("repo_id", help="owner/name")
    parser.add_argument("--results", help="results.json of an evaluation, for the card's table")
    parser.add_argument("--private", action="store_true", default=None, help="a repository that is made is private")
    parser.add_argument("--revision", help="branch; main unless given")
    given = parser.parse_args(arguments)
    with plain_command():
        net, provenance = load_controller(given.directory)
        options = {"results": given.results, "private": given.private, "revision": given.revision}
        print(f"controller published: {upload(net, provenance, given.repo_id, **options)}")


if __name__ == "__main__":
    main()
