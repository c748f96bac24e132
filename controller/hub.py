"""A controller on the Hugging Face hub: its model card, and what is uploaded, in one commit."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from controller.checkpoint import save_controller
from controller.network import WidthNet
from decoding.config import DecodingConfig
from decoding.errors import UserError, first_line
from decoding.measure.pages import COLUMNS, cell, machine_of, markdown, present
from decoding.measure.results_file import Results, read_results

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CARD = "README.md"


def upload(
    net: WidthNet,
    provenance: dict[str, Any],
    repo_id: str,
    *,
    results: Results | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload a controller: weights, format, provenance and a model card, in one commit or not at all.

    Args:
        net, provenance: as `load_controller` returns them.
        repo_id: "owner/name"; made where it is not there.
        results: of an evaluation, for the card's table.
        private: whether a repository that is made is private; None: as the owner's settings say.
        token: of the hub; None: that of `hf auth login`, or HF_TOKEN.
        revision: branch; None: main.

    Returns:
        The commit's URL.

    Raises:
        UserError: no such name can be, the hub cannot be reached or refuses, or the results cannot be read.
    """
    if not HUB_ID.fullmatch(repo_id):
        raise UserError(f"{repo_id!r} is no name on the Hugging Face hub; give owner/name.")
    text = card(net, provenance, repo_id, results)
    with TemporaryDirectory() as scratch:
        folder = save_controller(net, Path(scratch) / "controller", provenance)
        (folder / CARD).write_text(text)
        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=f"Width controller {net.fingerprint}",
            )
        except (HfHubHTTPError, HTTPError, HFValidationError, OSError, ValueError) as error:
            raise UserError(
                f"The controller was not uploaded to {repo_id} ({first_line(error)}). Look whether the hub can be "
                "reached and the account may write there (hf auth login, or HF_TOKEN); the same command tries again."
            ) from error
    return str(commit.commit_url)


def card(
    net: WidthNet, provenance: Mapping[str, Any], repo_id: str | None = None, results: Results | None = None
) -> str:
    """The model card: pair, data, metrics, how to use it.

    Args:
        net, provenance: as `load_controller` returns them.
        repo_id: where it will be; None: in a directory.
        results: of an evaluation.
    """
    pair, decoding = provenance.get("pair") or {}, provenance.get("decoding") or {}
    data = ModelCardData(library_name="dsbd", license="apache-2.0", tags=["speculative-decoding", "beam-sampling"])
    defaults = DecodingConfig()
    changed = {name: value for name, value in decoding.items() if getattr(defaults, name, None) != value}
    settings = ", ".join(f"{name}={value!r}" for name, value in changed.items())
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# Width controller for {pair.get('name', 'an unnamed pair')}",
        "",
        "Decides, layer by layer, what is drafted in speculative beam sampling. It changes the speed, never the "
        f"tokens: those are of beam sampling by the target alone. At most {net.target_width} beams; "
        f"{net.parameter_count():,} weights.",
        "",
        "```python",
        "from controller import LearnedWidth",
        "from decoding import DecodingConfig, DSBDDecoder",
        f"policy = LearnedWidth.load({repo_id or 'a directory'!r}, pair=pair)  # another pair is refused",
        f"decoder = DSBDDecoder(pair, DecodingConfig({settings}), policy=policy)",
        "```",
        "",
        *_section("Pair", _flat(pair)),
    ]
    for traces in provenance.get("traces") or []:
        lines += _section("Data", _flat(traces))
    metrics = {name: f"{value:.4f}" for name, value in sorted((provenance.get("metrics") or {}).items())}
    lines += _section("Metrics", metrics)
    if results is not None:
        lines += _frontier(read_results(results))
    origin = {name: provenance.get(name) for name in ("date", "git_sha", "machine", "versions")}
    lines += _section("Origin", {**_flat(origin), "network": net.fingerprint})
    return str(ModelCard("\n".join(lines)))


def _section(title: str, values: Mapping[str, Any]) -> list[str]:
    """A heading and a table of two columns; nothing where there are no values."""
    body = [[name, str(value).replace("|", "\\|")] for name, value in values.items()]
    return [f"## {title}", "", *markdown(["", ""], body), ""] if body else []


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings of mappings as one, names joined by points; what is None is left out."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{below}": deep for below, deep in _flat(value).items()}
        elif value is not None:
            flat[name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _frontier(results: Mapping[str, Any]) -> list[str]:
    """The rows of an evaluation, and where they were measured."""
    rows = results["rows"]
    columns = present(rows, COLUMNS)
    body = [[row["name"], *(cell(row, column) for column in columns)] for row in rows]
    about = results["provenance"]
    where = f"{about['task']['name']}, {about['task']['prompts']} prompts, {machine_of(results)}, {about['date']}"
    table = markdown(["row", *(column.heading for column in columns)], body)
    return ["## Evaluation", "", f"{where}.", "", *table, ""]
